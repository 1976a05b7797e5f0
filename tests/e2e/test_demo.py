"""`tunewright demo` for real: interrupted once, continued, and good enough on the held-out rows."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.real_model]

DEMO = [sys.executable, "-m", "tunewright.cli.main", "demo"]
INTERRUPTED = 75
STEP = re.compile(r"^step (\d+)/")


def run_until_step(command: list[str], step: int) -> tuple[int, str]:
    """Start the demo, press Ctrl-C once it reported this step, and return its exit code and all it printed."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        found = STEP.match(line)
        if found and int(found[1]) >= step:
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=300)
    return process.returncode, seen + rest


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The demo's own report, after an interruption and a second run that continued."""
    folder = tmp_path_factory.mktemp("demo")
    command = [*DEMO, "--home", str(folder / "home"), "--json", str(folder / "report.json")]
    code, seen = run_until_step(command, 3)
    assert code == INTERRUPTED, seen
    assert "Predicted: about" in seen and "of memory" in seen
    assert "`tunewright demo` continues it" in seen
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Continuing the demo" in done.stdout
    got = json.loads((folder / "report.json").read_text())
    return {**got, "stdout": done.stdout}


def value(report: dict[str, Any], system: str, measure: str) -> float:
    return report["systems"][system][measure]["value"]


def test_the_tuned_model_reaches_the_targets(report: dict[str, Any]) -> None:
    assert value(report, "base", "valid_json") == 0
    assert value(report, "tuned", "valid_json") >= 0.95
    assert value(report, "tuned", "department") >= 0.80


def test_the_tuned_model_is_above_every_baseline(report: dict[str, Any]) -> None:
    rivals = set(report["systems"]) - {"tuned"}
    assert rivals == {"base", "base + 3 examples", "majority class", "TF-IDF + logistic"}
    best = max(value(report, rival, "department") for rival in rivals)
    assert value(report, "tuned", "department") > best
    assert report["verdicts"]["department"]["word"] == "better"


def test_the_result_is_a_model_and_the_output_says_how_to_go_on(report: dict[str, Any]) -> None:
    assert (Path(report["result"]) / "adapter_model.safetensors").is_file()
    for text in (report["model"], report["result"], "tunewright up --open", "from openai import OpenAI", "95 %"):
        assert text in report["stdout"]


def test_the_report_holds_every_answer(report: dict[str, Any]) -> None:
    assert len(report["rows"]) == 100
    assert {frozenset(row["answers"]) for row in report["rows"]} == {frozenset({"base", "base + 3 examples", "tuned"})}
