"""Shared fixtures: the tiny model, a data folder, rows to train on. Only tests that use a model import torch."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import tiny
from tunewright.core.home import Home, find_home
from tunewright.jobs.describe import load_describe


def pytest_sessionstart() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    """Nothing that the imports left is garbage, and each job that a test runs looks for some: in most of its time it
    would look through that (as train/worker.py says)."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny random Llama, shared by the session: read it, never write into it."""
    return tiny.build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Callable[[str], Path]:
    """built(family) -> the folder of that tiny model of tiny.FAMILIES, made once: read it, never write into it."""
    return cache(lambda family: tiny.build_family(tmp_path_factory.mktemp("family") / "m", family, tiny_model_dir))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """An empty data folder, but for the compiled kernels."""
    made = Home(tmp_path / "home").ensure()
    tiny.share_kernels(made.root)
    return made


@pytest.fixture
def tiny_home(home: Home, tiny_model_dir: Path) -> Home:
    """A data folder in which the tiny model answers to the name `tiny`."""
    tiny.install_tiny_model(home.root, "tiny", built=tiny_model_dir)
    return home


@pytest.fixture(scope="session")
def described(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The describe file, which takes seconds: for the cache of data folders whose server or command would make it."""
    made = Home(tmp_path_factory.mktemp("described") / "home")
    load_describe(made)
    (path,) = made.cache.glob("describe-*.json")
    return path


@pytest.fixture
def sft_rows() -> Callable[[int], list[dict[str, Any]]]:
    """sft_rows(n) -> n chat rows."""
    return tiny.sft_rows


@pytest.fixture
def sft_file() -> Callable[..., Path]:
    """sft_file(folder, n=24, name="train.jsonl") -> the path of a JSONL file with n chat rows."""

    def make(folder: Path, n: int = 24, name: str = "train.jsonl") -> Path:
        return tiny.write_rows(folder / name, tiny.sft_rows(n))

    return make


@pytest.fixture(scope="session")
def bitsandbytes() -> Path:
    """The folder in which Python finds bitsandbytes, from here on in this process, too: `make sdks` installs it apart,
    because peft imports it wherever it is, which takes seconds."""
    spec = find_spec("bitsandbytes")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parents[1]
    sdks = Path(os.environ.get("TUNEWRIGHT_SDKS") or Path(__file__).parents[1] / ".sdks")
    place = next(sdks.glob("bitsandbytes-*"), None)
    if place is None:
        pytest.skip("bitsandbytes is not installed: run `make sdks`")
    sys.path.append(str(place))
    return place


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of SmolLM2-135M-Instruct: that of this machine's data folder, else made once for the session."""
    from tunewright.models.loader import materialise

    own = find_home()
    there = (own.models / tiny.SMOLLM2 / "config.json").is_file()
    return materialise(tiny.SMOLLM2, own if there else Home(tmp_path_factory.mktemp("real")).ensure())


@pytest.fixture(scope="session")
def kernels() -> Any:
    """The C++ kernels of this machine, on two threads."""
    from tunewright.ops.kernels import KernelsMissing, load_kernels

    try:
        return load_kernels(tiny.KERNELS, 2)
    except KernelsMissing as e:
        pytest.skip(str(e))
