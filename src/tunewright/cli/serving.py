"""What `tunewright up` does: checks the place, starts the API and the dashboard, says where they are, tends them."""

from __future__ import annotations

import http.client
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tunewright.cli.health import can_bind, nearest_free_port
from tunewright.cli.processes import Child, child_env, tend
from tunewright.core.errors import Busy, UserError
from tunewright.core.home import Home
from tunewright.core.run import list_runs

READY_SECONDS = 180.0
STOP_SECONDS = 30.0
TICK_SECONDS = 0.1
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Place:
    """Where to listen and on what. web_port is None without a dashboard."""

    home: Home
    host: str
    port: int
    web_port: int | None
    open: bool

    @property
    def token_file(self) -> Path:
        """Where the API puts the token of the sign-in link."""
        return self.home.root / "signin-token"

    def url(self, port: int) -> str:
        """The address that a browser on this machine uses."""
        shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def choose_place(home: Home, host: str, port: int, web_port: int | None, no_web: bool, open: bool) -> Place:
    """The place, with a free port for the dashboard where none was asked for.

    Raises Busy for a port in use, with the nearest free one; UserError if `open` would let others in.
    """
    if open and host not in LOOPBACK:
        raise UserError(
            f"--open asks nobody for a key, so it is refused on {host}, which others can reach. "
            "Leave --open out, or use --host 127.0.0.1."
        )
    check_port(host, port, "--port")
    if no_web:
        return Place(home, host, port, None, open)
    if web_port is None:
        return Place(home, host, port, nearest_free_port(host, port + 1), open)
    if web_port == port:
        raise UserError(f"The API and the dashboard cannot both use port {port}. Choose another --web-port.")
    check_port(host, web_port, "--web-port")
    return Place(home, host, port, web_port, open)


def check_port(host: str, port: int, option: str) -> None:
    """Raises Busy with the nearest free port if `port` is taken, UserError if `host` is not an address of ours."""
    if can_bind(host, port):
        return
    if not can_bind(host, 0):
        raise UserError(f"'{host}' is not an address of this machine. Use 127.0.0.1, or 0.0.0.0 for all of them.")
    raise Busy(
        f"Port {port} on {host} is in use by another program. The nearest free one: {option} "
        f"{nearest_free_port(host, port + 1)}"
    )


def make_first_key(home: Home, open: bool = False) -> str | None:
    """A new API key if the data folder has none yet and the server asks for one.

    Raises Busy if another server uses the folder.
    """
    from tunewright.jobs.store import Store

    store = Store.open(home)
    try:
        needed = not open and not any(k.kind == "key" for k in store.list_keys())
        return store.add_key("first key")[0] if needed else None
    finally:
        store.close()


def make_children(place: Place) -> list[Child]:
    """The API, then the dashboard. Neither is started yet."""
    env = child_env(place.home.root)
    shared = ["--host", place.host, *(["--open"] if place.open else [])]
    api = [sys.executable, "-m", "tunewright.api", "--home", str(place.home.root), "--port", str(place.port), *shared]
    token = ["--signin-token-file", str(place.token_file)]
    children = [Child("API", [*api, *token], env, place.home.logs / "api.log")]
    if place.web_port is not None:
        web = [sys.executable, "-m", "tunewright.web", "--api-url", place.url(place.port)]
        log = place.home.logs / "dashboard.log"
        children.append(Child("dashboard", [*web, "--port", str(place.web_port), *shared], env, log))
    return children


def catch_stops() -> list[int]:
    """The list to which every signal that asks to stop is added."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, note)
    return asked


def is_ready(url: str, path: str = "/healthz") -> bool:
    """Whether `url` answers 200 to GET path."""
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def serve(place: Place, children: Sequence[Child], stops: Sequence[int], say: Callable[[str], None]) -> int:
    """Keep the children alive until a signal or a child that must not be restarted. Returns the exit code."""
    ports = [p for p in (place.port, place.web_port) if p is not None]
    announced, since = False, time.monotonic()
    while not stops:
        for child in children:
            code = tend(child, say)
            if code is not None:
                return code
        if not announced:
            late = next((c.name for c, p in zip(children, ports, strict=True) if not is_ready(place.url(p))), None)
            if late is None:
                announced = True
                announce(place, say)
            elif time.monotonic() - since > READY_SECONDS:
                raise Busy(f"The {late} did not become ready within {READY_SECONDS:.0f} seconds.")
        time.sleep(TICK_SECONDS)
    return 0


def announce(place: Place, say: Callable[[str], None]) -> None:
    """Where everything is."""
    say(f"API:        {place.url(place.port)}/v1")
    if place.web_port is not None:
        say(f"Dashboard:  {place.url(place.web_port)}")
        if not place.open:
            token = place.token_file.read_text(encoding="ascii").strip()
            say(f"Sign in:    {place.url(place.web_port)}/signin?token={token}  (works once, for 15 minutes)")
    say(f"Data:       {place.home.root}")
    say("Ctrl-C stops everything.")


def still_training(home: Home) -> list[str]:
    """What to say of jobs whose worker lives on without the server."""
    ids = [run.id for run in list_runs(home) if run.is_active()]
    if not ids:
        return []
    return [f"Still training, without the server: {', '.join(ids)}. The next `tunewright up` shows them again."]
