"""A tiny model whose answers vary, and a data folder that has it: read them, never write into them."""

from __future__ import annotations

from pathlib import Path

import pytest

import engine_kit as kit
from tunewright.core.home import Home


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kit.make_model(tmp_path_factory.mktemp("lively") / "tiny")


@pytest.fixture(scope="session")
def lively_home(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Home:
    return kit.make_home(tmp_path_factory.mktemp("lively") / "home", model_dir)
