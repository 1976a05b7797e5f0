"""What several files read and never write into: a tiny model whose answers vary, a data folder with it, a training."""

from __future__ import annotations

from pathlib import Path

import pytest
from loop_kit import make_parts

import engine_kit as kit
from tunewright.core.home import Home
from tunewright.train.checkpoint import State
from tunewright.train.loop import Parts, train


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kit.make_model(tmp_path_factory.mktemp("lively") / "tiny")


@pytest.fixture(scope="session")
def lively_home(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Home:
    return kit.make_home(tmp_path_factory.mktemp("lively") / "home", model_dir)


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Parts:
    """The parts of an uninterrupted training with loop_kit's defaults, after it."""
    parts = make_parts(tmp_path_factory.mktemp("golden"), tiny_model_dir)
    train(parts, State())
    return parts
