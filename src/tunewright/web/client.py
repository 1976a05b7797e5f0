"""The dashboard's only door to the outside: the public HTTP API, with every failure as one readable ApiError."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx

from tunewright.core.errors import TunewrightError

PAGE = 100
MAX_PAGES = 5


class ApiError(TunewrightError):
    """What the API refused, in its own words. status: of HTTP. problems: lines of a data file that are not usable."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str | None = None,
        param: str | None = None,
        problems: Sequence[dict[str, Any]] = (),
    ) -> None:
        super().__init__(message, code=code, param=param)
        self.status = status
        self.problems = list(problems)


class ApiDown(ApiError):
    """The API did not answer at all; the same request may work in a moment."""

    def __init__(self, base_url: str, what: str = "does not answer") -> None:
        super().__init__(f"The API at {base_url} {what}. Trying again…", status=0, code="api_down")


@dataclass(frozen=True)
class ChatDelta:
    """One piece of a streamed answer. finish_reason and usage arrive once, near the end; of a recipe also `extra`, its
    passages or proposals."""

    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, int] | None = None
    extra: dict[str, Any] | None = None


class Api:
    """The endpoints that the pages use. Every method raises ApiError (ApiDown if nothing answers).

    base_url: `http://127.0.0.1:8000`. key: the session's API key, or None for a server that asks for none.
    """

    def __init__(self, base_url: str, key: str | None = None, http: httpx.AsyncClient | None = None) -> None:
        self.base_url = base_url.rstrip("/")
        self.key = key
        self._http = http or new_http()

    def with_key(self, key: str | None) -> Api:
        """The same connection pool under another key."""
        return Api(self.base_url, key, self._http)

    async def close(self) -> None:
        await self._http.aclose()

    # --- plumbing ----------------------------------------------------------------------------------------------------

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    async def request(self, method: str, path: str, **kwargs: Any) -> Any:
        """The JSON body of the answer."""
        headers = {**self._headers, **kwargs.pop("headers", {})}
        try:
            answer = await self._http.request(method, self.base_url + path, headers=headers, **kwargs)
        except httpx.TimeoutException as e:
            raise ApiDown(self.base_url, "takes long to answer") from e
        except httpx.TransportError as e:
            raise ApiDown(self.base_url) from e
        if answer.is_error:
            raise error_from(answer.status_code, answer.content)
        return answer.json()

    @asynccontextmanager
    async def stream(self, method: str, path: str, **kwargs: Any) -> AsyncIterator[httpx.Response]:
        """An open answer whose body is read piece by piece."""
        url = self.base_url + path
        try:
            async with self._http.stream(method, url, headers=self._headers, **kwargs) as answer:
                if answer.is_error:
                    raise error_from(answer.status_code, await answer.aread())
                yield answer
        except httpx.TransportError as e:
            raise ApiDown(self.base_url) from e

    async def pages(self, path: str, *, until: str | None = None, max_pages: int = MAX_PAGES) -> list[dict[str, Any]]:
        """Items of a list endpoint in its order (newest first), at most `max_pages` pages, up to the id `until`."""
        found: list[dict[str, Any]] = []
        for _ in range(max_pages):
            after = {"after": found[-1]["id"]} if found else {}
            page = await self.request("GET", path, params={"limit": PAGE, **after})
            for item in page["data"]:
                if item["id"] == until:
                    return found
                found.append(item)
            if not page.get("has_more") or not page["data"]:
                break
        return found

    # --- endpoints ---------------------------------------------------------------------------------------------------

    async def sign_in(self, token: str) -> str:
        """Trade the one-time token of the sign-in link for an API key."""
        return (await self.request("POST", "/v1/tunewright/sessions", json={"token": token}))["key"]

    async def describe(self) -> dict[str, Any]:
        """parts: kind -> name -> {schema, defaults, card, doc} of all that jobs and recipes are made of. models: what
        is known of each base model."""
        # a server asked for the first time has to find out, which takes it a while
        return await self.request("GET", "/v1/tunewright/describe", timeout=180.0)

    async def models(self) -> list[dict[str, Any]]:
        return (await self.request("GET", "/v1/models"))["data"]

    async def jobs(self) -> list[dict[str, Any]]:
        """Newest first, at most 500."""
        return await self.pages("/v1/fine_tuning/jobs")

    async def job(self, job_id: str) -> dict[str, Any]:
        return await self.request("GET", f"/v1/fine_tuning/jobs/{job_id}")

    async def create_job(self, body: dict[str, Any]) -> dict[str, Any]:
        # a key of ours, so that a click repeated after a broken connection cannot start a second job
        headers = {"Idempotency-Key": secrets.token_hex(16)}
        return await self.request("POST", "/v1/fine_tuning/jobs", json=body, headers=headers)

    async def check_job(self, body: dict[str, Any]) -> dict[str, Any]:
        """{usable, message, param}: what creating a job would say to this body."""
        return await self.request("POST", "/v1/tunewright/jobs/check", json=body, timeout=60.0)

    async def recipes(self) -> list[dict[str, Any]]:
        """Models made without training, newest first."""
        return (await self.request("GET", "/v1/tunewright/recipes"))["data"]

    async def create_recipe(self, body: dict[str, Any]) -> dict[str, Any]:
        # encoding many documents takes a while
        return await self.request("POST", "/v1/tunewright/recipes", json=body, timeout=1800.0)

    async def delete_model(self, name: str) -> None:
        await self.request("DELETE", f"/v1/models/{quote(name, safe=':')}")

    async def act(self, job_id: str, action: str) -> dict[str, Any]:
        """action: `cancel`, `pause` or `resume`. The job as it is afterwards."""
        return await self.request("POST", f"/v1/fine_tuning/jobs/{job_id}/{action}")

    async def events(self, job_id: str, until: str | None = None) -> list[dict[str, Any]]:
        """Newest first, up to (without) the event `until`."""
        return await self.pages(f"/v1/fine_tuning/jobs/{job_id}/events", until=until)

    async def checkpoints(self, job_id: str) -> list[dict[str, Any]]:
        return await self.pages(f"/v1/fine_tuning/jobs/{job_id}/checkpoints", max_pages=1)

    async def metrics(self, job_id: str, after_step: int) -> list[dict[str, Any]]:
        """The points of the charts with step > after_step, in order."""
        params = {"after_step": after_step}
        return (await self.request("GET", f"/v1/tunewright/jobs/{job_id}/metrics", params=params))["data"]

    async def files(self, *purposes: str) -> list[dict[str, Any]]:
        """Files of these purposes (`fine-tune` if none is named), newest first."""
        found = await self.pages("/v1/files")
        return [f for f in found if f["purpose"] in (purposes or ("fine-tune",))]

    async def file(self, file_id: str) -> dict[str, Any]:
        return await self.request("GET", f"/v1/files/{file_id}")

    async def check_file(self, file_id: str, min_examples: int = 10, format: str = "auto") -> dict[str, Any]:
        """{usable, message, format, reason, notes, n_rows, n_problems, problems: [{line, field, value, …}]}."""
        asked = {"min_examples": min_examples, "format": format}
        return await self.request("POST", f"/v1/tunewright/files/{file_id}/check", json=asked, timeout=600.0)

    async def upload(
        self, name: str, size: int, chunks: AsyncIterator[bytes], purpose: str = "fine-tune"
    ) -> dict[str, Any]:
        """Send a file without ever holding it whole. size: bytes that `chunks` will yield."""
        head, tail, kind = multipart_frame(name, {"purpose": purpose})

        async def body() -> AsyncIterator[bytes]:
            yield head
            async for chunk in chunks:
                yield chunk
            yield tail

        headers = {"Content-Type": kind, "Content-Length": str(len(head) + size + len(tail))}
        return await self.request("POST", "/v1/files", content=body(), headers=headers, timeout=600.0)

    async def chat(self, body: dict[str, Any]) -> AsyncIterator[ChatDelta]:
        """Stream one chat completion."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        timeout = httpx.Timeout(10.0, read=600.0)
        async with self.stream("POST", "/v1/chat/completions", json=body, timeout=timeout) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield delta_from(json.loads(line[6:]))


def new_http() -> httpx.AsyncClient:
    """A client that goes straight to the API: no proxy from the environment, no redirects."""
    return httpx.AsyncClient(timeout=httpx.Timeout(15.0, connect=3.0), trust_env=False)


def error_from(status: int, body: bytes) -> ApiError:
    """The ApiError of an OpenAI-shaped error body, or of whatever else came."""
    try:
        error = json.loads(body)["error"]
        message, code, param = str(error["message"]), error.get("code"), error.get("param")
        return ApiError(message, status=status, code=code, param=param, problems=error.get("problems") or ())
    except (ValueError, KeyError, TypeError):
        return ApiError(f"The API answered with HTTP status {status}.", status=status)


def delta_from(chunk: dict[str, Any]) -> ChatDelta:
    """One server-sent chunk. Raises ApiError if the stream carries an error."""
    if "error" in chunk:
        error = chunk["error"]
        raise ApiError(str(error.get("message")), status=500, code=error.get("code"), param=error.get("param"))
    choice = (chunk.get("choices") or [{}])[0]
    text = (choice.get("delta") or {}).get("content") or ""
    return ChatDelta(text, choice.get("finish_reason"), chunk.get("usage"), chunk.get("tunewright"))


def multipart_frame(name: str, fields: dict[str, str]) -> tuple[bytes, bytes, str]:
    """(bytes before the file, bytes after it, Content-Type) of a multipart body with `fields` and one file."""
    boundary = secrets.token_hex(16)
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in sorted(fields.items())
    ]
    safe = name.replace("\\", "_").replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
    parts.append(
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{safe}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    return "".join(parts).encode(), f"\r\n--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"
