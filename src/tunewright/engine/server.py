"""The engine as a program: `python -m tunewright.engine.server --home HOME --ready-file F`. Loopback and a token.

POST /generate   one request, answered by JSON lines (see engine.py for the events)
POST /unload     {"folder": path or null}: forget idle weights
POST /threads    {"threads": n or "auto"}: CPU threads from the next step on
GET  /health     what runs and what is loaded

The token comes from the environment variable TUNEWRIGHT_ENGINE_TOKEN or from --token-file. Every error is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from tunewright.core.durable import write_json
from tunewright.core.errors import AuthError, TunewrightError, UserError
from tunewright.core.home import Home, find_home
from tunewright.engine.engine import Engine
from tunewright.engine.request import parse_request
from tunewright.engine.worker import EngineThread, Stream

TOKEN_VARIABLE = "TUNEWRIGHT_ENGINE_TOKEN"
MAX_BODY = 32 << 20
log = logging.getLogger(__name__)


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


def serve(home: Home, token: str, ready_file: Path, *, port: int, threads: int | str, dtype: str) -> None:
    """Serve until SIGTERM. The ready file {"port", "pid"} appears, at once and whole, when requests can come."""
    threading.excepthook = _die_with_thread
    thread = EngineThread(lambda: Engine(home, dtype=dtype, threads=threads))
    app = make_app(thread, token)
    listener = socket.create_server(("127.0.0.1", port))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        thread.start()
        await thread.call(lambda engine: engine.stats())  # the engine's thread is up
        write_json(ready_file, {"port": listener.getsockname()[1], "pid": os.getpid()})
        yield
        thread.stop()

    app.router.lifespan_context = lifespan
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=1, server_header=False, ws="none"
    )
    asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))


def _die_with_thread(failure: threading.ExceptHookArgs) -> None:
    """A server without its engine would only make clients wait; whoever started it starts it again."""
    log.critical("the engine's thread ended", exc_info=failure.exc_value)
    os._exit(70)


def exit_with_stdin() -> None:
    """End this process when its stdin closes, that is when the process that started it is gone, however it went."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(0)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tunewright.engine.server", description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--home", help="the data folder")
    parser.add_argument("--ready-file", type=Path, required=True)
    parser.add_argument("--token-file", type=Path, help=f"holds the token, if {TOKEN_VARIABLE} is not set")
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--threads", default="auto", help="CPU threads, or auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--nice", action="store_true", help="low priority: training comes first")
    parser.add_argument("--exit-with-stdin", action="store_true", help="end when stdin closes")
    args = parser.parse_args()
    token = os.environ.pop(TOKEN_VARIABLE, "") or (args.token_file.read_text().strip() if args.token_file else "")
    if not token:
        sys.exit(f"The engine needs a token: set {TOKEN_VARIABLE} or give --token-file.")
    if args.exit_with_stdin:
        exit_with_stdin()
    if args.nice:
        os.nice(5)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    threads = args.threads if args.threads == "auto" else int(args.threads)
    serve(find_home(args.home), token, args.ready_file, port=args.port, threads=threads, dtype=args.dtype)


if __name__ == "__main__":
    main()
