"""`tunewright up` as a user runs it: real processes on real ports, killed and stopped."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest

from tunewright.core.home import Home

pytestmark = pytest.mark.slow
PATIENCE_S = 120.0


def free_port() -> int:
    """A port whose next one is free as well."""
    for port in range(21000, 30000, 7):
        with socket.socket() as a, socket.socket() as b:
            try:
                a.bind(("127.0.0.1", port))
                b.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


def wait_for(what: str, true: Callable[[], Any], seconds: float = PATIENCE_S) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, f"waited too long for {what}"
        time.sleep(0.05)
    return found


class Up:
    """One `tunewright up` and what it has printed."""

    def __init__(self, home: Home, *options: str) -> None:
        self.port = free_port()
        self.out = home.root / "up.out"
        with open(self.out, "wb") as out:
            command = [sys.executable, "-m", "tunewright.cli.main", "up", "--port", str(self.port)]
            self.process = subprocess.Popen(
                [*command, "--home", str(home.root), *options],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.out.read_text()

    def said(self, pattern: str) -> re.Match[str] | None:
        return re.search(pattern, self.text)

    def wait_until_ready(self) -> None:
        wait_for("the closing line", lambda: self.said("Ctrl-C stops everything") or self.process.poll() is not None)
        assert self.process.poll() is None, self.text

    def children(self) -> dict[str, psutil.Process]:
        """By module: tunewright.api, tunewright.web."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            command = child.cmdline()
            if "-m" in command:
                found[command[command.index("-m") + 1]] = child
        return found

    def api(self, path: str, key: str | None = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", headers=headers, timeout=30)

    def stop(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


@pytest.fixture
def up(home: Home) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def start(*options: str) -> Up:
        started.append(Up(home, *options))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.terminate()
            one.process.wait(PATIENCE_S)


def test_a_first_start_shows_a_key_and_a_link_that_works_once(up: Callable[..., Up], home: Home) -> None:
    server = up()
    server.wait_until_ready()
    key = server.said(r"API key: +(sk-\S+)")
    link = server.said(r"Sign in: +(http://\S+)")
    assert key and link
    assert server.api("/healthz").json()["status"] == "ready"
    assert server.api("/v1/models").status_code == 401
    assert server.api("/v1/models", key[1]).status_code == 200
    with httpx.Client(follow_redirects=True, timeout=60) as browser:
        assert browser.get(link[1]).url.path == "/jobs"
    with httpx.Client(follow_redirects=True, timeout=60) as other:
        assert "problem=link" in str(other.get(link[1]).url)
    children = server.children()
    assert set(children) == {"tunewright.api", "tunewright.web"}
    assert server.stop() == 0
    assert not any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children.values())
    assert not (home.root / "signin-token").exists()

    again = up("--no-web")
    again.wait_until_ready()
    assert "API key" not in again.text and "Sign in" not in again.text
    assert again.api("/v1/models", key[1]).status_code == 200
    assert set(again.children()) == {"tunewright.api"}
    assert again.stop(signal.SIGTERM) == 0


def test_what_dies_is_started_again(up: Callable[..., Up]) -> None:
    server = up("--open")
    server.wait_until_ready()
    assert server.api("/v1/models").status_code == 200 and "API key" not in server.text
    first = server.children()
    first["tunewright.api"].kill()
    assert wait_for("the news", lambda: server.said(r"The API was killed by SIGKILL. Starting it again in 1 s."))
    first["tunewright.web"].kill()
    assert wait_for("the news", lambda: server.said(r"The dashboard was killed by SIGKILL. Starting it again in 1 s."))

    def both_answer() -> bool:
        try:
            web = httpx.get(f"http://127.0.0.1:{server.port + 1}/healthz")
            return server.api("/healthz").status_code == 200 and web.status_code == 200
        except httpx.TransportError:
            return False

    wait_for("both to answer", both_answer)
    second = server.children()
    assert all(second[name].pid != first[name].pid for name in first)
    assert server.stop() == 0


def test_nothing_is_left_when_the_command_itself_is_killed(up: Callable[..., Up]) -> None:
    server = up("--open", "--no-web")
    server.wait_until_ready()
    api = server.children()["tunewright.api"]
    server.process.kill()
    server.process.wait()
    wait_for("the API to end", lambda: not api.is_running() or api.status() == psutil.STATUS_ZOMBIE)


def test_a_second_server_on_the_folder_is_refused_and_harms_nothing(up: Callable[..., Up], home: Home) -> None:
    server = up("--open", "--no-web")
    server.wait_until_ready()
    command = [sys.executable, "-m", "tunewright.cli.main", "up", "--home", str(home.root)]
    taken = subprocess.run([*command, "--port", str(server.port)], capture_output=True, text=True, check=False)
    assert taken.returncode == 69 and "The nearest free one: --port" in taken.stderr and taken.stderr.count("\n") == 1
    other = subprocess.run([*command, "--port", str(free_port())], capture_output=True, text=True, check=False)
    assert other.returncode == 69 and "in use by another tunewright server" in other.stderr
    assert other.stderr.count("\n") == 1
    assert server.api("/healthz").status_code == 200
    assert server.stop() == 0
