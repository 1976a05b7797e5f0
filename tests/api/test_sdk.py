"""The journey of a user of OpenAI's fine-tuning, with the unmodified SDK in three versions (see journey.py)."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import install_sdks
import pytest
from live import LiveServer, make_home

SCRIPT = Path(__file__).with_name("journey.py")
NEWEST = install_sdks.VERSIONS[0]
SECONDS = 900  # a journey takes about one minute
FUNCTIONS = [node.name for node in ast.parse(SCRIPT.read_text()).body if isinstance(node, ast.FunctionDef)]


def checks(version: str) -> list[str]:
    return [f for f in FUNCTIONS if f.startswith(("check_", "newest_check_") if version == NEWEST else "check_")]


def run_journey(version: str, url: str) -> dict[str, Any]:
    """Check -> its result, as the script printed it; "" -> what it printed besides."""
    env = {**os.environ, "PYTHONPATH": str(install_sdks.folder() / version)}
    command = [sys.executable, str(SCRIPT), f"{url}/v1", *(["--all"] if version == NEWEST else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"": f"it took more than {SECONDS} s"}
    return {"": done.stderr, **{line["check"]: line for line in map(json.loads, done.stdout.splitlines())}}


@pytest.fixture(scope="module")
def journey(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, described: Path
) -> Iterator[Callable[[str], dict[str, Any]]]:
    """The results of a version's journey, made when they are first asked for. One server sees all of them."""
    home = make_home(tmp_path_factory.mktemp("sdk") / "home", tiny_model_dir, described)
    with LiveServer(home, "--open") as alone:
        yield cache(lambda version: run_journey(version, alone.url))


@pytest.mark.slow
@pytest.mark.parametrize(("version", "check"), [(v, check) for v in install_sdks.VERSIONS for check in checks(v)])
def test_every_sdk(journey: Callable[[str], dict[str, Any]], version: str, check: str) -> None:
    if not install_sdks.installed(version):
        pytest.skip(f"openai {version} is not installed: run `make sdks`")
    results = journey(version)
    assert check in results, f"the journey did not come so far: {results['']}"
    assert results[check]["ok"], results[check]["error"]
