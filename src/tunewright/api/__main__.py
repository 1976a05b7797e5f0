"""`python -m tunewright.api --home H --host 127.0.0.1 --port P`: the API server, until a signal ends it."""

from __future__ import annotations

import argparse
import errno
import os
import socket
import sys
from pathlib import Path

import uvicorn

from tunewright.api.app import create_app
from tunewright.api.auth import check_exposure
from tunewright.api.guard import MAX_HEADER_BYTES
from tunewright.core.errors import Busy, TunewrightError, UserError
from tunewright.core.home import find_home
from tunewright.jobs.store import Store

GRACE_SECONDS = 5


def main(argv: list[str] | None = None) -> int:
    """Run the server; returns the exit code. What is wrong with the input is said in one line on stderr."""
    options = _options(argv)
    try:
        return serve(options)
    except TunewrightError as e:
        print(e.message, file=sys.stderr)
        return e.exit_code


def serve(options: argparse.Namespace) -> int:
    check_exposure(options.host, options.open)
    listener = listen(options.host, options.port)
    port = listener.getsockname()[1]
    store = Store.open(find_home(options.home).ensure())
    app = create_app(
        store, host=options.host, port=port, open_access=options.open, allow_hosts=options.allow_host or ()
    )
    if options.signin_token_file is not None:
        write_secret(options.signin_token_file, store.new_signin_token())
    print(f"tunewright API: http://{_shown(options.host)}:{port}/v1", flush=True)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=2 * MAX_HEADER_BYTES,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    uvicorn.Server(config).run(sockets=[listener])
    return 0


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tunewright.api", description="The tunewright API server.")
    parser.add_argument("--home", type=Path, help="the data folder (default: TUNEWRIGHT_HOME, else ~/.tunewright)")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default: 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to bind; 0 takes a free one (default: 8000)")
    parser.add_argument("--open", action="store_true", help="ask for no API key; only allowed on loopback")
    parser.add_argument("--allow-host", action="append", metavar="NAME", help="one more host name to answer to")
    parser.add_argument("--signin-token-file", type=Path, metavar="F", help="write a one-time sign-in token to F")
    return parser.parse_args(argv)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises Busy (the port is taken) or UserError (the address is not usable here)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(128)
    except OSError as e:
        sock.close()
        if e.errno == errno.EADDRINUSE:
            raise Busy(
                f"Port {port} on {host} is in use by another program. Choose another with --port {port + 1}, or "
                "--port 0 for any free one."
            ) from e
        raise UserError(
            f"The server cannot listen on {host}, port {port} ({os.strerror(e.errno or 0)}). Use --host 127.0.0.1 and "
            "a port from 1024 to 65535.",
            code="cannot_listen",
        ) from e
    except OverflowError as e:
        sock.close()
        raise UserError(f"{port} is not a port. Use 1024 to 65535, or 0 for any free one.") from e
    return sock


def write_secret(path: Path, text: str) -> None:
    """Write a file that only this user can read."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
        f.write(text)


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


if __name__ == "__main__":
    sys.exit(main())
