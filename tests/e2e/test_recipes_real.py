"""Recipes on the real model and the demo's data: what the documentation promises of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tunewright.metrics.intervals import paired_bootstrap

pytestmark = [pytest.mark.nightly, pytest.mark.slow, pytest.mark.real_model]
ROOT = Path(__file__).parents[2]


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=7200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_few_shot_beats_zero_shot_on_the_demo(tmp_path: Path) -> None:
    """The best zero-shot prompt of three against random examples, a mean over three draws."""
    report = tmp_path / "report.json"
    run("-m", "tunewright.cli.main", "recipe", "compare", "--home", str(tmp_path / "home"), "--json", str(report))
    systems: dict[str, Any] = {s["system"]: s for s in json.loads(report.read_text())["systems"]}
    for measure in ("valid_json", "department", "urgency"):
        zero, few = systems["prompt"]["spread"][measure][1], systems["few-shot, random"]["shares"][measure]
        assert few["low"] > zero, measure
    assert systems["base"]["shares"]["valid_json"]["value"] == 0


def test_proxy_tuning_moves_the_large_model_towards_the_task(tmp_path: Path) -> None:
    """The loss of right answers falls and more of them are right, row by row; the large model itself has none."""
    report = tmp_path / "report.json"
    run("-m", "benchmarks.proxy", "--json", str(report), "--alphas", "1")
    systems = json.loads(report.read_text())["systems"]
    moved, large = systems["proxy, alpha 1"], systems["large"]
    assert paired_bootstrap(moved["losses"], large["losses"]).high < 0
    for measure in ("valid_json", "department", "urgency"):
        assert paired_bootstrap(moved[measure], large[measure]).low > 0, measure
