"""A real API server in a process of its own, for tests: start, stop, kill -9, start again on the same data folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

import tiny
from tunewright.core.home import Home

# generous: tests run beside other work on small machines
START_SECONDS = 300.0
STOP_SECONDS = 120
SIGNIN_FILE = "signin"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def make_home(root: Path, tiny_model_dir: Path, described: Path) -> Path:
    """A data folder with the tiny model as `tiny` and `org/tiny-2`, and the describe file."""
    home = Home(root).ensure()
    tiny.install_tiny_model(root, "tiny", built=tiny_model_dir)
    second = tiny.install_tiny_model(root, "org--tiny-2", built=tiny_model_dir)
    (second / "source.json").write_text(
        json.dumps({"name": "org/tiny-2", "source": "a random model made by the tests"})
    )
    shutil.copy(described, home.cache)
    return root


class LiveServer:
    """`python -m tunewright.api` on a free port. The log of every start is in `log`."""

    def __init__(self, home: Path, *options: str) -> None:
        self.home = home
        self.options = options
        self.port = free_port()
        self.log = home / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._orphans: list[psutil.Process] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> LiveServer:
        command = [sys.executable, "-m", "tunewright.api", "--home", str(self.home), "--port", str(self.port)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen([*command, *self.options], stdout=log, stderr=log, env=env)
        self._wait_until_ready()
        return self

    def _wait_until_ready(self) -> None:
        assert self.process is not None
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended: {self.log.read_text()}")
            try:
                if httpx.get(f"{self.url}/healthz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"the server was not ready in {START_SECONDS} s: {self.log.read_text()}")

    def children(self, word: str) -> list[psutil.Process]:
        """Child processes, and theirs, whose command line holds `word`."""
        assert self.process is not None
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in found if word in " ".join(p.cmdline())]

    def _family(self) -> list[psutil.Process]:
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        """kill -9, as a power cut would; what the server had started lives on."""
        assert self.process is not None
        self._orphans += self._family()
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM; then whatever outlives the server, such as a worker, is killed."""
        if self.process is not None and self.process.poll() is None:
            self._orphans += self._family()
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_SECONDS)
            finally:
                self.process.kill()
        _, alive = psutil.wait_procs(self._orphans, timeout=3)
        for process in alive:
            process.kill()

    def __enter__(self) -> LiveServer:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()
