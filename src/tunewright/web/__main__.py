"""`python -m tunewright.web --api-url http://127.0.0.1:8000`: the dashboard process."""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from tunewright.core.errors import Busy, TunewrightError, UserError
from tunewright.core.home import find_home
from tunewright.web.guard import is_loopback


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tunewright.web", description="The tunewright dashboard.")
    parser.add_argument("--api-url", default="http://127.0.0.1:8000", help="where the API answers")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--open", action="store_true", help="the API asks for no key: no sign-in (loopback only)")
    parser.add_argument("--allow-host", action="append", default=[], help="another host name (with port) to answer to")
    parser.add_argument("--state-dir", type=Path, help="where sessions are kept (default: web/ in the data folder)")
    parser.add_argument("--secret-file", type=Path, help="the key that signs session cookies; made if missing")
    return parser.parse_args(argv)


def read_secret(path: Path) -> str:
    """The secret in the file, made on the first start; 0600."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        secret = path.read_text(encoding="ascii").strip()
        if len(secret) >= 32:
            return secret
        raise UserError(f"{path} holds no usable secret (32 characters or more). Delete it for a new one.") from None
    with os.fdopen(handle, "w", encoding="ascii") as f:
        f.write(secrets.token_urlsafe(48))
    return path.read_text(encoding="ascii")


def check_port(host: str, port: int) -> None:
    """Raises Busy if the address cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as e:
            raise Busy(
                f"The dashboard cannot listen on {host}:{port} ({e.strerror}). Choose another --port.",
                code="port_in_use",
            ) from e


def prepare(args: argparse.Namespace) -> str:
    """Check the arguments, make the state folder; the cookie secret. Raises TunewrightError."""
    if args.open and not is_loopback(args.host):
        raise UserError("--open is for this machine only. Leave it out, or bind to 127.0.0.1.", param="open")
    check_port(args.host, args.port)
    os.umask(0o077)
    state: Path = args.state_dir or (args.secret_file.parent if args.secret_file else find_home().root / "web")
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        secret = read_secret(args.secret_file or state / "secret")
    except OSError as e:
        raise UserError(f"The folder {state} cannot be written ({e.strerror}). Choose another --state-dir.") from e
    # NiceGUI reads this once, when it is imported
    os.environ["NICEGUI_STORAGE_PATH"] = str(state / "sessions")
    return secret


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        secret = prepare(args)
    except TunewrightError as e:
        print(e.message, file=sys.stderr)
        return e.exit_code
    from tunewright.web.client import Api
    from tunewright.web.desk import Desk
    from tunewright.web.shell import make_app

    desk = Desk(Api(args.api_url), public=args.open)
    app = make_app(desk, host=args.host, port=args.port, secret=secret, extra_hosts=args.allow_host)
    print(f"tunewright dashboard on http://{args.host}:{args.port} for the API at {args.api_url}", flush=True)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning", server_header=False, proxy_headers=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
