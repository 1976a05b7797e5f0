"""The engine's HTTP face: requests in, JSON lines out, every path behind the token, every error as JSON."""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from tunewright.core.errors import AuthError, TunewrightError, UserError
from tunewright.engine.engine import Engine
from tunewright.engine.request import RowsRequest, parse_as, parse_request
from tunewright.engine.worker import EngineThread, Stream

MAX_BODY = 32 << 20
AT_ONCE = 16  # rows that a head judges between two steps of the engine


def make_app(thread: EngineThread, token: str) -> FastAPI:
    """The HTTP face of an engine thread. Every path needs `Authorization: Bearer <token>`."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(OnlyWithToken, token=token)

    @app.exception_handler(TunewrightError)
    async def ours(request: Request, error: TunewrightError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(UserError(str(error.detail), code="http_error"), error.status_code)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(UserError("The request is not valid."))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"pid": os.getpid(), **await thread.call(lambda engine: engine.stats())}

    @app.post("/generate")
    async def generate(request: Request) -> StreamingResponse:
        asked = parse_request(await read_json_body(request))
        stream = Stream(thread)
        await stream.open(asked)
        return StreamingResponse(lines(stream), media_type="application/x-ndjson")

    @app.post("/rows")
    async def rows(request: Request) -> dict[str, Any]:
        asked = parse_as(RowsRequest, await read_json_body(request))
        # in parts, so that answers in progress go on between them
        starts = range(0, len(asked.rows), AT_ONCE)
        parts = [asked.model_copy(update={"rows": asked.rows[i : i + AT_ONCE]}) for i in starts]
        found = [await thread.call(partial(_judge, part, i)) for i, part in zip(starts, parts, strict=True)]
        results = [r for part in found for r in part["results"]]
        return {**found[0], "results": results, "prompt_tokens": sum(part["prompt_tokens"] for part in found)}

    @app.post("/unload")
    async def unload(request: Request) -> dict[str, int]:
        folder = (await read_json_body(request)).get("folder")
        return {"unloaded": await thread.call(lambda engine: engine.unload(folder))}

    @app.post("/threads")
    async def threads(request: Request) -> dict[str, int]:
        wanted = (await read_json_body(request)).get("threads")
        if wanted != "auto" and not (isinstance(wanted, int) and 1 <= wanted <= 1024):
            raise UserError(f"'threads' is {wanted!r}; allowed: 'auto' or 1 to 1024.", param="threads")
        await thread.call(lambda engine: engine.set_threads(wanted))
        return {"threads": await thread.call(lambda engine: engine.threads)}

    return app


def _judge(asked: RowsRequest, first: int, engine: Engine) -> dict[str, Any]:
    return engine.rows.judge(asked, first)


class OnlyWithToken:
    """Answers 401 to every HTTP request without the token, whatever its path."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app = app
        self.expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                await error_response(AuthError("The engine's token is missing or wrong."))(scope, receive, send)
                return
        await self.app(scope, receive, send)


async def lines(stream: Stream) -> AsyncIterator[bytes]:
    """The events as JSON lines. A client that goes away ends this generator, which frees the request."""
    try:
        while True:
            event = await stream.next()
            yield json.dumps(event, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
            if event["type"] in ("done", "error"):
                return
    finally:
        stream.close()


async def read_json_body(request: Request) -> dict[str, Any]:
    """The body as a JSON object. Raises UserError."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise UserError(f"The request is larger than {MAX_BODY >> 20} MiB.", code="request_too_large")
    try:
        value = json.loads(bytes(body))
    except ValueError as e:
        raise UserError("The request's body is not JSON.", code="invalid_json") from e
    if not isinstance(value, dict):
        raise UserError("The request's body is not a JSON object.", code="invalid_json")
    return value


def error_response(error: TunewrightError, status: int | None = None) -> JSONResponse:
    return JSONResponse({"error": error.to_openai()}, status or error.status)
