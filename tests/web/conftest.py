"""The whole stack for the tests that drive a browser, started once: a data folder, API and dashboard, Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stack import Program, api_program, web_program

import tiny


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, described: Path) -> Path:
    root = tmp_path_factory.mktemp("browser")
    tiny.install_tiny_model(root / "home", "tiny", built=tiny_model_dir)
    shutil.copy(described, root / "home" / "cache")
    return root


@pytest.fixture(scope="session")
def api(folder: Path) -> Iterator[Program]:
    with api_program(folder / "home", "--open") as running:
        yield running


@pytest.fixture(scope="session")
def web(folder: Path, api: Program) -> Iterator[Program]:
    with web_program(folder, api.url, "--open") as running:
        yield running


@pytest.fixture(scope="session")
def browser(folder: Path, api: Program, web: Program) -> Iterator[Any]:
    from chromium import start_browser

    started = start_browser(folder / "profile", web.url, api.url)
    yield started
    started.driver.quit()
