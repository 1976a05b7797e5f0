"""The engine as a program: `python -m tunewright.engine.server --home HOME --ready-file F`. Loopback and a token.

torch and the rest are imported only once the arguments are known to be right.

POST /generate   one request, answered by JSON lines (see engine.py for the events)
POST /rows       texts or conversations for a model with a head, answered at once (see rows.py)
POST /unload     {"folder": path or null}: forget idle weights
POST /threads    {"threads": n or "auto"}: CPU threads from the next step on
GET  /health     what runs and what is loaded

The token comes from the environment variable TUNEWRIGHT_ENGINE_TOKEN or from --token-file. Every error is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright.core.durable import write_json
from tunewright.core.home import Home, find_home

if TYPE_CHECKING:
    from fastapi import FastAPI

TOKEN_VARIABLE = "TUNEWRIGHT_ENGINE_TOKEN"
log = logging.getLogger(__name__)


def serve(home: Home, token: str, ready_file: Path, *, port: int, threads: int | str, dtype: str) -> None:
    """Serve until SIGTERM. The ready file {"port", "pid"} appears, at once and whole, when requests can come."""
    import uvicorn

    from tunewright.engine.engine import Engine
    from tunewright.engine.http import make_app
    from tunewright.engine.worker import EngineThread

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
