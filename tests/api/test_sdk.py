"""The journey of a user of OpenAI's fine-tuning, with the unmodified SDK in three versions (see journey.py)."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import install_sdks
import pytest
from live import LiveServer, make_home

SCRIPT = Path(__file__).with_name("journey.py")
NEWEST = install_sdks.VERSIONS[0]
FUNCTIONS = [node.name for node in ast.parse(SCRIPT.read_text()).body if isinstance(node, ast.FunctionDef)]


def checks(version: str) -> list[str]:
    return [f for f in FUNCTIONS if f.startswith(("check_", "newest_check_") if version == NEWEST else "check_")]


def run_journey(version: str, url: str, *options: str) -> dict[str, Any]:
    """Check -> its result, as the script printed it."""
    if not install_sdks.installed(version):
        pytest.skip(f"openai {version} is not installed: run `make sdks`")
    env = {**os.environ, "PYTHONPATH": str(install_sdks.folder() / version)}
    command = [sys.executable, str(SCRIPT), f"{url}/v1", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900, check=False)
    results = {line["check"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, done.stderr
    return results


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, described: Path) -> Iterator[LiveServer]:
    """A server that sees nothing but the journeys, one after the other."""
    home = make_home(tmp_path_factory.mktemp("sdk") / "home", tiny_model_dir, described)
    with LiveServer(home, "--open") as running:
        yield running


@pytest.fixture(scope="module")
def journey(request: pytest.FixtureRequest, alone: LiveServer) -> dict[str, Any]:
    return run_journey(request.param, alone.url, *(["--all"] if request.param == NEWEST else []))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("journey", "check"), [(v, check) for v in install_sdks.VERSIONS for check in checks(v)], indirect=["journey"]
)
def test_every_sdk(journey: dict[str, Any], check: str) -> None:
    assert journey[check]["ok"], journey[check]["error"]
