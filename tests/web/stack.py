"""The real processes that the dashboard's tests talk to: `python -m tunewright.api` and `python -m tunewright.web`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

START_SECONDS = 90.0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Program:
    """`python -m MODULE … --port P` on a free port that it keeps over restarts. `log` has what every start printed."""

    def __init__(self, module: str, folder: Path, *options: str) -> None:
        self.module = module
        self.options = options
        self.port = free_port()
        self.log = folder / f"{module}.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Program:
        command = [sys.executable, "-m", self.module, "--port", str(self.port), *self.options]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            try:
                # the API answers 503 while it still learns what it can train; its pages work already
                if httpx.get(f"{self.url}/healthz").status_code in (200, 503):
                    return self
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError(f"{self.module} did not answer in {START_SECONDS} s: {self.log.read_text()}")

    def kill(self) -> None:
        """kill -9, with whatever it had started left to itself."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM; whatever outlives it is killed."""
        if self.process is None or self.process.poll() is not None:
            return
        left = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            for process in psutil.wait_procs(left, timeout=20)[1]:
                process.kill()

    def __enter__(self) -> Program:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()


def api_program(home: Path, *options: str) -> Program:
    home.mkdir(parents=True, exist_ok=True)
    return Program("tunewright.api", home, "--home", str(home), *options)


def web_program(folder: Path, api_url: str, *options: str) -> Program:
    state = ("--state-dir", str(folder / "web"))
    return Program("tunewright.web", folder, "--api-url", api_url, *state, *options)
