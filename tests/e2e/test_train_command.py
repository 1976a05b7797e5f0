"""`tunewright train` as a user runs it: a real worker, Ctrl-C, resume, a chat with the result."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from tunewright.core.home import Home
from tunewright.core.run import list_runs, read_artefact
from tunewright.tuners import TUNERS

pytestmark = pytest.mark.slow
COMMAND = [sys.executable, "-m", "tunewright.cli.main"]


@pytest.fixture
def env(tiny_home: Home, described: Path) -> dict[str, str]:
    shutil.copy(described, tiny_home.cache)
    return {**os.environ, "TUNEWRIGHT_HOME": str(tiny_home.root), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def job(tmp_path: Path, sft_file: Callable[..., Path]) -> Path:
    sft_file(tmp_path, 24)
    path = tmp_path / "job.yaml"
    path.write_text("model: tiny\ntraining_file: train.jsonl\nsuffix: cli\nbatch_size: 4\ndtype: float32\nthreads: 1\n")
    return path


def test_ctrl_c_saves_and_the_printed_command_goes_on(env: dict[str, str], job: Path, tiny_home: Home) -> None:
    long = [*COMMAND, "train", str(job), "--set", "n_epochs=50"]
    process = subprocess.Popen(long, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not any(e.type == "metrics" for r in list_runs(tiny_home) for e in r.all_events()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert "Stopping after this step and saving a checkpoint." in out
    found = re.search(r"To continue: +tunewright (train --resume (ftjob-\w+))\n", out)
    assert found, out
    (run,) = list_runs(tiny_home)
    assert run.id == found[2]
    saved = max(e.data["step"] for e in run.events() if e.type == "checkpoint")
    assert saved < 300

    resumed = subprocess.Popen(
        [*COMMAND, *found[1].split()], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not any(e.attempt == 2 and e.type == "metrics" for e in run.all_events()):
        assert resumed.poll() is None and time.monotonic() < deadline + 120
        time.sleep(0.05)
    resumed.send_signal(signal.SIGTERM)
    out, _ = resumed.communicate(timeout=120)
    assert f"goes on from step {saved}" in out
    steps = [e.data["step"] for e in run.events() if e.type == "metrics"]
    assert steps == list(range(1, len(steps) + 1))


def test_a_job_from_file_to_answer(env: dict[str, str], job: Path, tiny_home: Home) -> None:
    def call(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *args], env=env, input=stdin, capture_output=True, text=True, timeout=300, check=False
        )

    done = call("train", str(job), "--set", "n_epochs=2", "--set", "tuner.r=4")
    assert done.returncode == 0, done.stderr
    assert "Plan: 24 rows" in done.stdout and "step 12/12" in done.stdout
    name = re.search(r"Done. The model is (\S+)\n", done.stdout)
    assert name and name[1].startswith("ft:tiny:personal:cli:")
    (run,) = list_runs(tiny_home)
    assert run.job().spec.tuner.options["r"] == 4
    listed = [line.split("\t")[0] for line in call("models").stdout.splitlines()]
    assert name[1] in listed and f"{name[1]}:ckpt-step-6" in listed and f"{name[1]}:ckpt-step-12" not in listed

    answers = [call("chat", m, "--max-tokens", "8", "--temperature", "0", stdin="Hello\n\nBye\n") for m in listed[-2:]]
    for answer in answers:
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout.count("\n") >= 2
    again = call("train", "--resume", run.id)
    assert again.returncode == 65 and "has finished; its model is" in again.stderr
    typo = call("chat", name[1][:-1] + "_")
    assert typo.returncode == 65 and f"Did you mean '{name[1]}'?" in typo.stderr and typo.stderr.count("\n") == 1


def test_a_wrong_option_of_a_part_is_one_error(env: dict[str, str], job: Path, tiny_home: Home) -> None:
    done = subprocess.run(
        [*COMMAND, "train", str(job), "--set", "tuner.rank=4", "--set", "schedule=linaer"],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 64 and done.stderr.count("\n") == 1
    assert "has no option 'rank'" in done.stderr and "'linaer'" in done.stderr and "'linear'" in done.stderr
    assert not list_runs(tiny_home)


def test_preferences_from_a_job_file(env: dict[str, str], tmp_path: Path, tiny_home: Home) -> None:
    """Pairs, then marked answers from what that left; the progress says the margin."""

    def train(name: str, text: str) -> str:
        (tmp_path / name).write_text(f"{text}\nbatch_size: 4\nn_epochs: 2\ndtype: float32\nthreads: 1\n")
        command = [*COMMAND, "train", str(tmp_path / name)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        found = re.search(r"Done. The model is (\S+)\n", done.stdout)
        assert found and re.search(r"step 1/\d+ +loss [\d.]+ .*margin 0\.000", done.stdout), done.stdout
        return found[1]

    tiny.write_rows(tmp_path / "pairs.jsonl", tiny.pair_rows(16))
    tiny.write_rows(tmp_path / "held-out.jsonl", tiny.pair_rows(20)[16:])
    tiny.write_rows(tmp_path / "marks.jsonl", tiny.marked_rows(16))
    files = "training_file: pairs.jsonl\nvalidation_file: held-out.jsonl"
    dpo = train("dpo.yaml", f"model: tiny\n{files}\nobjective: {{name: dpo, beta: 0.2, label_smoothing: 0.05}}")
    kto = train("kto.yaml", f"model: {dpo}\ntraining_file: marks.jsonl\nobjective: kto")
    assert dpo != kto
    runs = {r.job().name: r for r in list_runs(tiny_home)}
    for name in (dpo, kto):
        last = [e.data for e in runs[name].events() if e.type == "metrics"][-1]
        assert last["train_reward_margin"] > 0


OPTIONS = {"bitfit": "add_biases: true", "last_layers": "layers: 1", "fishmask": "k: 300, examples: 6"}


@pytest.mark.nightly
@pytest.mark.parametrize("tuner", list(TUNERS))
def test_every_tuner_from_a_yaml_file(env: dict[str, str], job: Path, tiny_home: Home, tuner: str) -> None:
    """The real command; its result says which tuner made it and is asked through the command line."""
    options = f", {OPTIONS[tuner]}" if tuner in OPTIONS else ""
    job.write_text(f"{job.read_text()}n_epochs: 1\ntuner: {{name: {tuner}{options}}}\n")
    done = subprocess.run([*COMMAND, "train", str(job)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = list_runs(tiny_home)
    record = read_artefact(run.result)
    assert record.tuner["name"] == tuner and record.kind == TUNERS.load(tuner).card.artefact
    assert record.name in done.stdout
    chat = [*COMMAND, "chat", record.name, "--max-tokens", "4"]
    said = subprocess.run(chat, env=env, input="what colour is the sky?\n", capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
