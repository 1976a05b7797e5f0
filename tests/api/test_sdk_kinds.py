"""A job of every kind over the API with the unmodified SDK, waited for, and called next to the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import install_sdks
import pytest
from live import LiveServer, make_home

from tunewright.tuners import TUNERS

SCRIPT = Path(__file__).with_name("journey_kinds.py")
AFTERWARDS = ("recipes", "side_by_side", "deleted")
# adapters beside their base and in front of the text, a delta, whole weights
ONE_OF_EACH_KIND = ("lora", "prompt", "fishmask", "half")


def run(server: LiveServer, *tuners: str) -> dict[str, Any]:
    """Check -> its result."""
    version = install_sdks.VERSIONS[0]
    if not install_sdks.installed(version):
        pytest.skip(f"openai {version} is not installed: run `make sdks`")
    env = {**os.environ, "PYTHONPATH": str(install_sdks.folder() / version)}
    command = [sys.executable, str(SCRIPT), f"{server.url}/v1", *tuners]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    return {line["check"]: line for line in map(json.loads, done.stdout.splitlines())}


def problems(results: dict[str, Any]) -> list[str]:
    return [f"{check}: {line['error']}" for check, line in results.items() if not line["ok"]]


@pytest.mark.slow
def test_a_job_of_each_kind_and_recipes(server: LiveServer) -> None:
    results = run(server, *ONE_OF_EACH_KIND)
    assert set(results) == {*ONE_OF_EACH_KIND, *AFTERWARDS} and not problems(results), "\n".join(problems(results))


@pytest.mark.slow
@pytest.mark.nightly
def test_jobs_over_a_quantised_base(
    bitsandbytes: Path, tmp_path: Path, tiny_model_dir: Path, described: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(bitsandbytes)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    asked = ("lora+nf4", "houlsby+int8", "prompt+nf4")
    with LiveServer(make_home(tmp_path / "home", tiny_model_dir, described), "--open") as with_package:
        results = run(with_package, *asked)
    assert set(results) == {*asked, *AFTERWARDS} and not problems(results), "\n".join(problems(results))


@pytest.mark.slow
@pytest.mark.nightly
def test_every_tuner_of_the_table(server: LiveServer) -> None:
    results = run(server, *TUNERS)
    assert set(results) == {*TUNERS, *AFTERWARDS} and not problems(results), "\n".join(problems(results))
