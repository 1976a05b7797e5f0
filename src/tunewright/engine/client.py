"""The engine seen from other processes: starts the program, keeps it alive, talks to it over loopback. Torch-free."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tunewright.core.durable import read_json
from tunewright.core.errors import Busy, ModelNotFound, NotFound, TunewrightError, UserError
from tunewright.core.home import Home

Event = dict[str, Any]
START_SECONDS = 120.0
DEATHS, DEATHS_WITHIN_SECONDS = 3, 60.0
# plain HTTP to ourselves: no proxy, and no certificates, whose loading would cost more than the request
_HTTP: dict[str, Any] = {"timeout": httpx.Timeout(10.0, read=None), "trust_env": False, "verify": False}
# what the child gets of our environment; nothing else, so that no secret travels
_ENV = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")
_ENV_PREFIXES = ("TUNEWRIGHT_", "OMP_", "GOMP_", "MKL_", "CUDA_", "NVIDIA_", "HF_", "SSL_", "HTTP_PROXY", "HTTPS_PROXY")


class EngineFailed(TunewrightError):
    """The engine could not be started, or died while it answered."""

    code = "engine_failed"


@dataclass(frozen=True)
class Reply:
    """A whole answer. choices: [{"index", "finish_reason", "text", "tool_calls"?}]; text is the first one's.

    extra: what a recipe tells of its making: contexts, proposals.
    """

    choices: list[Event]
    usage: dict[str, int]
    extra: Event = field(default_factory=dict)

    @property
    def text(self) -> str:
        return str(self.choices[0]["text"])


@dataclass(frozen=True)
class _Child:
    process: subprocess.Popen[bytes]
    url: str
    token: str

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def settle(self) -> None:
        """After a broken connection: give a dying process a moment to be dead."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(0.5)


@dataclass
class EngineProcess:
    """The engine's process, started when needed. Use from any number of tasks or threads.

    threads: CPU threads, None for all; dtype: auto, float32 or bfloat16.
    """

    home: Home
    threads: int | None = None
    dtype: str = "auto"
    _child: _Child | None = None
    _deaths: list[float] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def state(self) -> str:
        """`running`, `stopped` (it starts with the next request) or `failing` (it died too often)."""
        if self._child is not None and self._child.alive:
            return "running"
        return "failing" if self._broken() else "stopped"

    @property
    def pid(self) -> int | None:
        return self._child.process.pid if self._child is not None and self._child.alive else None

    async def ensure(self) -> None:
        """Start the process if it is not alive. Raises EngineFailed, also after several deaths within a minute."""
        if self._child is None or not self._child.alive:
            await asyncio.to_thread(self.ensure_now)

    def ensure_now(self) -> _Child:
        """ensure() for code without an event loop; returns the live child."""
        with self._lock:
            child = self._child
            if child is not None and child.alive:
                return child
            if child is not None:
                self._bury(child)
                self._child = None
            if self._broken():
                raise EngineFailed(
                    f"The engine ended {DEATHS} times within a minute and is not started again for now. "
                    f"Its last words are in {self.log_file.name} in the data folder's logs."
                )
            try:
                self._child = _spawn(self.home, self.log_file, self.threads, self.dtype)
            except EngineFailed:
                self._deaths.append(time.monotonic())
                raise
            return self._child

    async def generate(self, payload: Mapping[str, Any]) -> AsyncGenerator[Event, None]:
        """The events of a request (see engine.py), up to and including `done`. Closing it aborts the request.

        A process that died before it took the request is started again; one that died later has lost the answer.
        Raises the engine's error as UserError, ModelNotFound, Busy or EngineFailed.
        """
        for last_try in (False, True):
            await self.ensure()
            child, begun = self._live(), False
            try:
                async with (
                    httpx.AsyncClient(**_HTTP) as http,
                    http.stream("POST", f"{child.url}/generate", json=dict(payload), headers=_auth(child)) as response,
                ):
                    begun = True
                    if response.status_code != 200:
                        raise as_error(await response.aread(), response.status_code)
                    async for line in response.aiter_lines():
                        event = _event(line)
                        yield event
                        if event["type"] == "done":
                            return
            except httpx.HTTPError as e:
                await asyncio.to_thread(child.settle)
                if begun or last_try or child.alive:
                    raise _died(child, e) from e

    async def health(self) -> Event:
        """What runs and what is loaded; starts nothing. {} when the engine is not running."""
        return await self._ask("GET", "/health") if self.state == "running" else {}

    async def rows(self, payload: Mapping[str, Any]) -> Event:
        """What a model with a head says of rows (see engine/rows.py). Raises like generate."""
        await self.ensure()
        return await self._ask("POST", "/rows", dict(payload))

    async def set_threads(self, threads: int | None) -> None:
        """CPU threads from now on (None: all), also for a process that starts later."""
        self.threads = threads
        if self.state == "running":
            await self._ask("POST", "/threads", {"threads": threads or "auto"})

    async def unload(self, folder: str | None = None) -> None:
        """Forget idle weights loaded from `folder`, or all idle ones."""
        if self.state == "running":
            await self._ask("POST", "/unload", {"folder": folder})

    async def aclose(self) -> None:
        """End the process."""
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """End the process: SIGTERM, then SIGKILL after a few seconds."""
        with self._lock:
            child, self._child = self._child, None
        if child is not None:
            child.process.terminate()
            try:
                child.process.wait(5)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            if child.process.stdin is not None:
                child.process.stdin.close()

    @property
    def log_file(self) -> Path:
        return self.home.logs / "engine.log"

    async def _ask(self, method: str, path: str, body: Event | None = None) -> Event:
        child = self._live()
        try:
            async with httpx.AsyncClient(**_HTTP) as http:
                response = await http.request(method, f"{child.url}{path}", json=body, headers=_auth(child))
        except httpx.HTTPError as e:
            raise _died(child, e) from e
        if response.status_code != 200:
            raise as_error(response.content, response.status_code)
        return response.json()

    def _live(self) -> _Child:
        child = self._child
        if child is None:
            raise EngineFailed("The engine is stopped.")
        return child

    def _bury(self, child: _Child) -> None:
        self._deaths.append(time.monotonic())
        if child.process.stdin is not None:
            child.process.stdin.close()

    def _broken(self) -> bool:
        now = time.monotonic()
        self._deaths[:] = [t for t in self._deaths if now - t < DEATHS_WITHIN_SECONDS]
        return len(self._deaths) >= DEATHS


class EngineSession:
    """An engine for as long as a command runs, without an event loop: `with EngineSession(home) as engine: …`."""

    def __init__(self, home: Home, threads: int | None = None, dtype: str = "auto") -> None:
        self.process = EngineProcess(home, threads, dtype)
        self._http = httpx.Client(**_HTTP, limits=httpx.Limits(max_connections=None, max_keepalive_connections=32))

    def __enter__(self) -> EngineSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.close()
        self.process.close()

    def stream(self, payload: Mapping[str, Any]) -> Iterator[Event]:
        """The events of a request, up to and including `done`. Raises like EngineProcess.generate."""
        child = self.process.ensure_now()
        try:
            with self._http.stream("POST", f"{child.url}/generate", json=dict(payload), headers=_auth(child)) as r:
                if r.status_code != 200:
                    raise as_error(r.read(), r.status_code)
                for line in r.iter_lines():
                    event = _event(line)
                    yield event
                    if event["type"] == "done":
                        return
        except httpx.HTTPError as e:
            child.settle()
            raise _died(child, e) from e

    def reply(self, payload: Mapping[str, Any]) -> Reply:
        """The whole answer to a request."""
        for event in self.stream(payload):
            if event["type"] == "done":
                return Reply(event["choices"], event["usage"], event.get("extra", {}))
        raise EngineFailed("The engine stopped before the answer was complete.")

    def chat(
        self,
        messages: list[Event],
        *,
        base: str | None = None,
        artefact: str | Path | None = None,
        **options: Any,
    ) -> str:
        """The text of one answer. options: temperature, max_tokens, stop, seed … of GenerateRequest."""
        return self.reply(payload(messages, base, artefact, **options)).text

    def chat_many(
        self, payloads: Iterable[Mapping[str, Any]], concurrency: int = 16
    ) -> Iterator[Reply | TunewrightError]:
        """Answers in the order of the requests, each as soon as it and those before it are there.

        The engine computes up to `concurrency` of them together. An error stands in its request's place.
        """

        def one(p: Mapping[str, Any]) -> Reply | TunewrightError:
            try:
                return self.reply(p)
            except TunewrightError as e:
                return e

        self.process.ensure_now()
        with ThreadPoolExecutor(concurrency) as pool:
            yield from pool.map(one, payloads)


def payload(
    messages: list[Event], base: str | None = None, artefact: str | Path | None = None, **options: Any
) -> Event:
    """A request for chat_many() or generate()."""
    where = {"base": base, "artefact": None if artefact is None else str(Path(artefact).absolute())}
    return {**where, "messages": messages, **options}


def as_error(body: bytes, status: int) -> TunewrightError:
    """The engine's error answer as one of our errors."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return EngineFailed(f"The engine answered with status {status} and no readable error.")
    return _from_error(error, status)


def _from_error(error: Event, status: int) -> TunewrightError:
    if error.get("code") == ModelNotFound.code:
        kind: type[TunewrightError] = ModelNotFound
    elif status in (429, 503):
        kind = Busy
    elif status == 404:
        kind = NotFound
    else:
        kind = UserError if 400 <= status < 500 and status != 401 else EngineFailed
    return kind(str(error.get("message")), code=error.get("code"), param=error.get("param"))


def _event(line: str) -> Event:
    event = json.loads(line)
    if event["type"] == "error":
        raise _from_error(event["error"], int(event.get("status", 500)))
    return event


def _died(child: _Child, cause: Exception | None = None) -> EngineFailed:
    how = "ended" if not child.alive else "broke the connection"
    note = f" ({type(cause).__name__})" if cause is not None and child.alive else ""
    return EngineFailed(f"The engine {how} before the answer was complete{note}. Send the request again.")


def _auth(child: _Child) -> dict[str, str]:
    return {"Authorization": f"Bearer {child.token}"}


def child_env(token: str) -> dict[str, str]:
    """The environment of the engine's process: what a program needs, the token, and no secrets of ours."""
    kept = {k: v for k, v in os.environ.items() if k in _ENV or k.upper().startswith(_ENV_PREFIXES)}
    # a thread that waits for the other spins for half a millisecond, not fifteen: as fast when the machine is free,
    # many times faster when it is not
    ours = {"TOKENIZERS_PARALLELISM": "false", "GOMP_SPINCOUNT": "10000"}
    return {**ours, **kept, "TUNEWRIGHT_ENGINE_TOKEN": token}


def _spawn(home: Home, log_file: Path, threads: int | None, dtype: str) -> _Child:
    """Start the program and wait until it can be asked. It ends by itself when we do: its stdin is our pipe."""
    token = secrets.token_urlsafe(32)
    home.logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tunewright-engine-") as place, open(log_file, "ab") as log:
        ready = Path(place) / "ready.json"
        command = [sys.executable, "-m", "tunewright.engine.server", "--home", str(home.root), "--nice"]
        command += ["--ready-file", str(ready), "--exit-with-stdin", "--dtype", dtype]
        command += ["--threads", str(threads or "auto")]
        process = subprocess.Popen(
            command,
            env=child_env(token),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        deadline = time.monotonic() + START_SECONDS
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                process.wait()
                raise EngineFailed(f"The engine did not start. {_last_words(log_file)}")
            time.sleep(0.05)
        port = int(read_json(ready)["port"])
    return _Child(process, f"http://127.0.0.1:{port}", token)


def _last_words(log_file: Path) -> str:
    """The last line that the program wrote, for the message; the whole log stays on disk."""
    lines = log_file.read_bytes()[-4000:].decode(errors="replace").strip().splitlines()
    return f"Its log {log_file.name} ends with: {lines[-1][:300]}" if lines else f"Its log {log_file.name} is empty."
