"""`python -m benchmarks.sft` as a user runs it, with the tiny model: gates pass, the JSON says what was measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import recipe_kit
import tiny
from tunewright.core.home import Home

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TRL_IS_THERE = (ROOT / "benchmarks" / ".venv-trl" / ".made-from").exists()
N_ROWS = 40


@pytest.fixture
def env(tiny_home: Home) -> dict[str, str]:
    return {**os.environ, "TUNEWRIGHT_HOME": str(tiny_home.root), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Rows that fit the tiny model's context."""
    lines = (ROOT / "benchmarks" / "data" / "short.jsonl").read_text(encoding="utf-8").splitlines()
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([line for line in lines if len(line) < 400][:N_ROWS]) + "\n", encoding="utf-8")
    return path


def command(rows: Path, *more: str) -> list[str]:
    fixed = ["--data", str(rows), "--model", "tiny", "--threads", "1", "--batch", "4", "--only", "ours,plain"]
    return [sys.executable, "-m", "benchmarks.sft", *fixed, *more]


@pytest.mark.nightly
def test_ours_and_the_plain_loop_side_by_side(env: dict[str, str], rows: Path) -> None:
    done = subprocess.run(
        command(rows, "--rounds", "1", "--seconds", "4", "--min-steps", "5", "--json", "-"),
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["complete"] and all(g["ok"] for g in found["gates"])
    names = {g["name"] for g in found["gates"]}
    assert {"float32 loss", "ours: token ids and masks", "ours: gradient norm", "ours: held-out loss"} <= names
    measured = {r["rival"]: r for r in found["rows"]}
    assert set(measured) == {"ours", "plain"}
    for row in measured.values():
        assert row["window_steps"] >= 5 and 0 < row["supervised_per_second"] < row["tokens_per_second"]
        assert row["peak_bytes"] > 50e6 and row["startup_s"] > 0 and row["seconds_to_loss"] > row["startup_s"]
    ratio = measured["ours"]["tokens_per_second"] / measured["plain"]["tokens_per_second"]
    assert found["ratios"] == {"plain": pytest.approx(ratio)}
    assert found["versions"]["ours"]["tunewright"] and found["versions"]["plain"]["peft"]
    assert "ours" in done.stderr and "tokens/s" in done.stderr


@pytest.mark.nightly
def test_a_gate_that_fails_stops_everything(env: dict[str, str], rows: Path, tmp_path: Path) -> None:
    """Another rate for one of the two is another training: nothing may be timed."""
    code = (
        "import sys; from dataclasses import replace; from benchmarks import sft, process\n"
        "real = process.run_ours\n"
        "process.run_ours = lambda task, *rest, **more: real(replace(task, lr=task.lr * 50), *rest, **more)\n"
        "sys.exit(sft.main(sys.argv[1:]))"
    )
    out = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, "-c", code, *command(rows, "--json", str(out))[3:]],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    found = json.loads(out.read_text())
    assert [g["name"] for g in found["gates"] if not g["ok"]]
    assert found["rows"] == [] and not found["complete"]


@pytest.mark.nightly
def test_ctrl_c_keeps_what_was_measured(env: dict[str, str], rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    process = subprocess.Popen(
        command(rows, "--no-gates", "--rounds", "50", "--seconds", "2", "--json", str(out)),
        cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    deadline = time.monotonic() + 300
    try:
        for line in process.stderr:
            assert time.monotonic() < deadline
            if "round 1: plain" in line:
                process.send_signal(signal.SIGINT)
                break
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    found = json.loads(out.read_text())
    assert [r["rival"] for r in found["rows"]] == ["ours"] and not found["complete"] and found["gates"] == "skipped"


def side_by_side(program: str, env: dict[str, str], rows: Path, *more: str) -> dict[str, Any]:
    """The result of a comparison of one short round."""
    fixed = ["--data", str(rows), "--model", "tiny", "--threads", "1", "--rounds", "1", "--json", "-"]
    window = ["--seconds", "2", "--min-steps", "3", "--batch", "4"]
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{program}", *fixed, *window, *more],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert all(g["ok"] for g in found["gates"]) and all(r["window_steps"] > 0 for r in found["rows"])
    assert found["versions"].keys() == found["medians"].keys() == {r["rival"] for r in found["rows"]}
    return found


@pytest.mark.nightly
def test_pairs_side_by_side(env: dict[str, str], rows: Path) -> None:
    found = side_by_side("dpo", env, rows, "--only", "ours,plain")
    rates = {r["rival"]: r["tokens_per_second"] for r in found["rows"]}
    assert found["ratios"] == {"plain": pytest.approx(rates["ours"] / rates["plain"])}
    assert {"float32", "ours: tokens of each step", "ours: losses"} <= {g["name"] for g in found["gates"]}


@pytest.mark.nightly
@pytest.mark.parametrize("only", ["ours", "ours,trl_best"])
def test_rollouts_side_by_side(env: dict[str, str], rows: Path, only: str) -> None:
    """Every answer has its full length, and TRL makes of our answers what we do."""
    if "trl" in only and not TRL_IS_THERE:
        pytest.skip("the rivals' environment is not made; python -m benchmarks.venv makes it")
    found = side_by_side("grpo", env, rows, "--only", only, "--group", "4", "--tokens", "12")
    for row in found["rows"]:
        assert row["completion_tokens_mean"] == 12 and row["dead_share"] < 1
        assert row["completions_per_second"] == pytest.approx(16 * row["window_steps"] / row["window_s"])
    if "trl" in only:
        names = {g["name"] for g in found["gates"]}
        assert {f"trl_default in float32: {x}" for x in ("rewards", "loss", "gradient norm")} <= names
        assert found["ratios"].keys() == {"trl_best"}


@pytest.mark.nightly
def test_a_tuner_beside_lora_and_peft(env: dict[str, str], rows: Path) -> None:
    """AdaLoRA, whose loop in peft has a call of its own; DyLoRA, which peft has not."""
    window = ["--rounds", "1", "--seconds", "2", "--min-steps", "3", "--batch", "4", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tuners", "--data", str(rows), "--model", "tiny", "--only", "adalora,dylora",
         *window, "--json", "-"],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    sides = [f"{r['side']} {r['tuner']}" for r in found["rows"]]
    assert found["complete"] and sides == ["ours lora", "ours adalora", "peft adalora", "ours dylora"]
    rates = {(r["side"], r["tuner"]): r["tokens_per_second"] for r in found["rows"]}
    assert found["rows"][1]["path"] in ("fast", "plain") and "path" not in found["rows"][2]
    ada, dy = found["tuners"]["adalora"], found["tuners"]["dylora"]
    assert ada["of_lora"] == pytest.approx(rates["ours", "adalora"] / rates["ours", "lora"])
    assert ada["of_peft"] == pytest.approx(rates["ours", "adalora"] / rates["peft", "adalora"])
    assert dy["of_peft"] is None and dy["target_of_lora"] == 0.8


def long_model(home: Home, tmp_path: Path) -> Path:
    """A tiny model, `long`, whose context takes the demo's rows; returns a folder for results."""
    long = tiny.build_tiny_model(tmp_path / "long", max_position_embeddings=2048)
    tiny.install_tiny_model(home.root, "long", built=long)
    place = tmp_path / "results"
    place.mkdir()
    return place


RETAIN = """
import sys
from pathlib import Path
from benchmarks import methods_page, retain

place = Path(sys.argv.pop(1))
methods_page.PAGE, methods_page.RESULTS, retain.RESULTS = place / "methods.md", place, place / "retain"
sys.exit(retain.main(sys.argv[1:]))
"""


@pytest.mark.nightly
def test_forgetting_is_measured_once_and_told(env: dict[str, str], tiny_home: Home, tmp_path: Path) -> None:
    """The demo's rows and the manual's pages are longer than the tiny model's context."""
    place = long_model(tiny_home, tmp_path)
    asked = ["--model", "long", "--threads", "1", "--seeds", "1", "--only", "plain,replay"]

    def measure() -> str:
        done = subprocess.run(
            [sys.executable, "-c", RETAIN, str(place), *asked],
            cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "[2/2] old task manual: replay, seed 1" in measure()
    plain, replay = (json.loads((place / "retain" / "manual" / f"{m}-1.json").read_text()) for m in ("plain", "replay"))
    assert plain["options"] == {} and replay["options"] == {"coefficient": 1.0, "share": 0.25}
    assert plain["trained_tokens"] == replay["trained_tokens"] and plain["base"] == replay["base"]
    for found in (plain, replay):
        assert len(found["held_out"]) == 64 and len(found["old"]) == 32
        assert sum(found["held_out"]) < sum(found["base"]["held_out"])
    assert sum(replay["old"]) < sum(plain["old"])
    assert "| `replay` | 1 |" in (place / "methods.md").read_text()
    assert "[1/" not in measure()


UNTUNED = """
import sys
from dataclasses import replace
from pathlib import Path
from benchmarks import methods_page, untuned
from tunewright.cli.commands import demo

place = Path(sys.argv.pop(1))
methods_page.PAGE, methods_page.RESULTS, untuned.RESULTS = place / "methods.md", place, place / "untuned"
demo.MODEL = demo.SETTINGS["model"] = untuned.MODEL = "long"
demo.SETTINGS["n_epochs"] = 1
untuned.ASKED = replace(untuned.ASKED, k=1, seeds=1, rows=4, max_tokens=4, encoder="tiny-encoder")
sys.exit(untuned.main(["--threads", "1"]))
"""


@pytest.mark.nightly
def test_whether_tuning_pays_is_measured_once_and_told(env: dict[str, str], tiny_home: Home, tmp_path: Path) -> None:
    place = long_model(tiny_home, tmp_path)
    recipe_kit.add_encoder(tiny_home)

    def measure() -> str:
        done = subprocess.run(
            [sys.executable, "-c", UNTUNED, str(place)],
            cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "[9/9] tuned" in measure()
    found = {p.stem: json.loads(p.read_text()) for p in (place / "untuned").glob("*.json")}
    assert len(found) == 9 and set(found["baselines"]["cards"]) == {"majority class", "TF-IDF + logistic"}
    variants = [f for name, f in found.items() if name != "baselines"]
    assert all(len(f["answers"]) == f["n_rows"] == 4 and f["seconds"] > 0 for f in variants)
    assert found["tuned"]["training_seconds"] > 0
    page = (place / "methods.md").read_text()
    assert "| prompt (x3) |" in page and "Training took" in page and "- department: tuned against" in page
    (place / "untuned" / "base.json").unlink()
    assert "[1/1] base" in measure()


METHODS = """
import sys
from pathlib import Path
from benchmarks import methods, methods_page, papers_page

place = Path(sys.argv.pop(1))
methods_page.PAGE, methods_page.RESULTS, methods.RESULTS = place / "methods.md", place, place / "methods"
papers_page.PAGE = place / "papers.md"
sys.exit(methods.main(sys.argv[1:]))
"""


@pytest.mark.nightly
def test_a_tuner_is_measured_once_and_told(env: dict[str, str], tiny_home: Home, tmp_path: Path) -> None:
    place = long_model(tiny_home, tmp_path)
    asked = ["--model", "long", "--threads", "1", "--seeds", "1", "--only", "ia3"]

    def measure() -> str:
        done = subprocess.run(
            [sys.executable, "-c", METHODS, str(place), *asked],
            cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "[1/1] demo: ia3, seed 1" in measure()
    found = json.loads((place / "methods" / "demo" / "ia3-1.json").read_text())
    assert len(found["held_out"]) == len(found["base"]["held_out"]) == len(found["outcomes"]["department"]) == 100
    assert len(found["unrelated"]) == 32 and found["artefact_bytes"] > 0 and found["key"].count("-") == 1
    assert "| `ia3` | 1 |" in (place / "methods.md").read_text() and "`ia3`" in (place / "papers.md").read_text()
    assert "[1/" not in measure()
