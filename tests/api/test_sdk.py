"""The journey of a user of OpenAI's fine-tuning, with the unmodified SDK in three versions (see journey.py)."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import install_sdks
import pytest
from live import LiveServer, make_home

SCRIPT = Path(__file__).with_name("journey.py")
CHECKS = [
    node.name
    for node in ast.parse(SCRIPT.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith(("check_", "slow_check_"))
]


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


@pytest.fixture(scope="module", params=install_sdks.VERSIONS)
def every(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Any:
    """The whole journey, slow checks included, with each version on a server of its own."""
    home = make_home(tmp_path_factory.mktemp("sdk") / "home", tiny_model_dir)
    with LiveServer(home, "--open") as server:
        yield run_journey(request.param, server.url, "--slow")


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_every_sdk(every: dict[str, Any], check: str) -> None:
    assert every[check]["ok"], every[check]["error"]
