"""Killed and resumed = uninterrupted: the same loss at every step and the same weights, with real processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from tunewright.core.durable import sha256_file
from tunewright.core.home import Home
from tunewright.core.run import Run
from tunewright.core.spec import parse_spec
from tunewright.jobs.prepare import create_run

HERE = Path(__file__).parent
SPEC: dict[str, Any] = {
    "model": "tiny",
    "training_file": "train.jsonl",
    "validation_file": "valid.jsonl",
    "n_epochs": 3,
    "batch_size": 4,
    "micro_batch_tokens": 128,
    "eval_every": 2,
    "save_every_steps": 2,
    "seed": 7,
    "dtype": "float32",
    "threads": 1,
}
STEPS = 18


def new_run(home: Home, **changes: Any) -> Run:
    train = tiny.write_rows(home.root / "train.jsonl", tiny.sft_rows(24))
    valid = tiny.write_rows(home.root / "valid.jsonl", tiny.sft_rows(6))
    return create_run(home, parse_spec({**SPEC, **changes}), train_path=train, validation_path=valid)


def start(run: Run, home: Home, crash_at: int | None = None) -> subprocess.Popen[bytes]:
    """The worker as a real process; crash_at: it kills itself before that file operation of a save (0: never)."""
    program = ["-m", "tunewright.train.worker"] if crash_at is None else [str(HERE / "crash_worker.py")]
    args = [sys.executable, *program, str(run.folder), *([] if crash_at is None else [str(crash_at)])]
    env = {**os.environ, "TUNEWRIGHT_HOME": str(home.root), "OMP_NUM_THREADS": "1"}
    with open(home.root / "worker-output.txt", "ab") as log:
        return subprocess.Popen(args, env=env, stdout=log, stderr=log, start_new_session=True)


def finish(run: Run, home: Home, crash_at: int | None = None) -> None:
    """Run to the end; a failure shows the worker's output."""
    code = start(run, home, crash_at).wait(timeout=300)
    assert code == 0, (home.root / "worker-output.txt").read_text()[-3000:]


def story(run: Run) -> tuple[list[tuple[Any, ...]], str, list[int]]:
    """What must not differ: each step's numbers, the hash of the weights, the callable checkpoints."""
    events = run.events()
    keys = ("step", "train_loss", "train_mean_token_accuracy", "grad_norm", "lr", "valid_loss", "full_valid_loss")
    steps = [tuple(e.data.get(k) for k in keys) for e in events if e.type == "metrics"]
    epochs = [e.data["step"] for e in events if e.type == "checkpoint" and e.data["kind"] == "epoch"]
    return steps, sha256_file(run.result / "adapter_model.safetensors"), epochs


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[tuple[Home, Any, int]]:
    """The uninterrupted run: its data folder, its story, and how many file operations its saves made."""
    home = Home(tmp_path_factory.mktemp("golden")).ensure()
    tiny.install_tiny_model(home.root, "tiny", built=tiny_model_dir)
    run = new_run(home)
    finish(run, home, crash_at=0)
    expected = story(run)
    assert [s[0] for s in expected[0]] == list(range(1, STEPS + 1))
    yield home, expected, int((home.runs / "operations.txt").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(5))
def test_killed_inside_a_save(golden: tuple[Home, Any, int], moment: int) -> None:
    home, expected, operations = golden
    run = new_run(home)
    at = random.Random(f"save/{moment}").randint(1, operations)
    assert start(run, home, crash_at=at).wait(timeout=300) == -signal.SIGKILL
    finish(run, home)
    assert story(run) == expected


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(3))
def test_killed_between_steps(golden: tuple[Home, Any, int], moment: int) -> None:
    """Killed twice from outside, each time when a drawn step was reported."""
    home, expected, _ = golden
    run = new_run(home)
    draw = random.Random(f"step/{moment}")
    for low, high in ((1, 8), (9, STEPS - 1)):
        kill_at_step(run, home, draw.randint(low, high))
    finish(run, home)
    assert story(run) == expected


def kill_at_step(run: Run, home: Home, step: int) -> None:
    process = start(run, home)
    deadline = time.monotonic() + 200
    while not any(e.type == "metrics" and e.data["step"] >= step for e in run.events()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_sigterm_saves_and_the_next_attempt_goes_on(golden: tuple[Home, Any, int]) -> None:
    home, expected, _ = golden
    run = new_run(home)
    process = start(run, home)
    while not any(e.type == "metrics" for e in run.events()):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait(timeout=60) == 75
    end = run.end()
    assert end is not None and end.data["status"] == "interrupted"
    finish(run, home)
    assert story(run) == expected


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside(golden: tuple[Home, Any, int]) -> None:
    """A flipped bit in the newest checkpoint: the one before it is used, with a warning; the result is the same."""
    home, expected, _ = golden
    run = new_run(home)
    kill_at_step(run, home, 9)
    newest = max(p for p in run.checkpoints.iterdir() if p.name.startswith("step-") and "." not in p.name)
    victim = newest / "artefact" / "adapter_model.safetensors"
    raw = bytearray(victim.read_bytes())
    raw[-5] ^= 1
    victim.write_bytes(raw)
    finish(run, home)
    assert story(run) == expected
    assert any("damaged" in e.message and e.level == "warn" for e in run.events())
    assert newest.with_name(f"{newest.name}.damaged").exists()
