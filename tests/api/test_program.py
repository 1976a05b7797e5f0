"""`python -m tunewright.api` as a program: what is wrong with its input is said in one line, with an exit code."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from live import LiveServer, free_port


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tunewright.api", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.stdout == "" and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("--home", str(tmp_path / "home"), "--port", str(port))
    assert done.returncode == 69
    assert f"Port {port} on 127.0.0.1 is in use" in one_line(done) and "--port" in done.stderr
    assert not (tmp_path / "home").exists()


@pytest.mark.slow
def test_data_folder_in_use(server: LiveServer) -> None:
    done = run("--home", str(server.home), "--port", str(free_port()))
    assert done.returncode == 69 and "in use" in one_line(done)


@pytest.mark.slow
def test_open_to_others(tmp_path: Path) -> None:
    done = run("--home", str(tmp_path), "--host", "0.0.0.0", "--port", "0", "--open")
    assert done.returncode == 65 and "--open" in one_line(done)


@pytest.mark.slow
def test_address_of_another_machine(tmp_path: Path) -> None:
    done = run("--home", str(tmp_path), "--host", "203.0.113.1", "--port", str(free_port()))
    assert done.returncode == 65 and "203.0.113.1" in one_line(done)


@pytest.mark.parametrize("port", ["99999", "-1"])
def test_a_port_that_is_none(tmp_path: Path, port: str) -> None:
    done = run("--home", str(tmp_path), "--port", port)
    assert done.returncode == 65 and "port" in one_line(done)


@pytest.mark.slow
def test_data_folder_that_is_a_file(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("x")
    done = run("--home", str(place), "--port", str(free_port()))
    assert done.returncode == 65 and "cannot be written" in one_line(done)
