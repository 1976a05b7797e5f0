"""Fixtures of the API's tests: real servers on free ports with the tiny model installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from live import SIGNIN_FILE, LiveServer, make_home


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, described: Path) -> Iterator[LiveServer]:
    """An open server that the tests of a session share."""
    home = make_home(tmp_path_factory.mktemp("open") / "home", tiny_model_dir, described)
    with LiveServer(home, "--open") as running:
        yield running


@pytest.fixture(scope="session")
def locked_server(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, described: Path
) -> Iterator[LiveServer]:
    """A server that asks for a key; its one-time sign-in token is in home/signin."""
    home = make_home(tmp_path_factory.mktemp("locked") / "home", tiny_model_dir, described)
    with LiveServer(home, "--signin-token-file", str(home / SIGNIN_FILE)) as running:
        yield running


@pytest.fixture
def http(server: LiveServer) -> Iterator[httpx.Client]:
    """Plain HTTP to the open server."""
    with httpx.Client(base_url=server.url, timeout=300) as client:
        yield client
