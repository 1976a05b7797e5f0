"""What a foreground run shows and returns. The worker here is a real process that writes real events, without torch."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tunewright.cli import progress
from tunewright.core.durable import Lock, write_json
from tunewright.core.errors import Busy
from tunewright.core.home import Home
from tunewright.core.run import JobFile, Run
from tunewright.core.spec import parse_spec

HEAD = """
import os, signal, sys, time
from pathlib import Path
from tunewright.core.events import EventWriter
from tunewright.core.run import Run
run = Run(Path(sys.argv[1]))
n = max(run.attempts(), default=0) + 1
run.attempt(n).mkdir(parents=True)
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
events = EventWriter(run.attempt(n) / "events.jsonl", n)
def step(i):
    data = {"step": i, "total_steps": 3, "train_loss": 1 / i, "tokens_per_second": 500.0, "eta_s": 9.0}
    events.write("metrics", "", data)
"""
GOOD = """
events.write("phase", "", {"name": "loading", "done": 0, "total": 1})
events.write("plan", "", {"n_rows": 24, "n_epochs": 1, "total_steps": 3, "batch_size": 8, "learning_rate": 0.001,
    "parameters": 1000, "trainable_parameters": 10, "predicted_seconds": 200.4, "peak_memory_bytes": 1_400_000_000,
    "dtype": "float32", "threads": 2, "n_tokens": 3000})
events.write("message", "row 3 is long", {}, "warn")
for i in (1, 2, 3):
    step(i)
events.write("end", "succeeded", {"status": "succeeded", "steps": 3})
"""
WAITS = """
step(1)
while not stopped:
    time.sleep(0.01)
step(2)
events.write("end", "Stopped after step 2; a checkpoint was saved.", {"status": "interrupted", "code": "interrupted"})
sys.exit(75)
"""
STUBBORN = """
step(1)
while True:
    time.sleep(0.01)
"""
FAILS = """
data = {"status": "failed", "code": "invalid_training_file", "message": "The data is bad."}
events.write("end", "The data is bad.", data)
sys.exit(65)
"""
KILLED = "step(1)\nos.kill(os.getpid(), signal.SIGKILL)\n"
CRASHES = "print('first'); print('ImportError: no torch'); sys.exit(3)\n"


@pytest.fixture
def run(home: Home) -> Run:
    made = Run(home.runs / "ftjob-1")
    made.folder.mkdir()
    spec = parse_spec({"model": "tiny", "training_file": "t"})
    job = JobFile(id=made.id, created_at=1.0, name="ft:tiny:p::AbCd1234", base="tiny", spec=spec, train="data/t")
    write_json(made.folder / "job.json", job.model_dump(mode="json"))
    return made


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[subprocess.Popen[Any]]]:
    """worker(body): the next worker is a process that runs HEAD + body. Returns the list of started ones."""

    def use(body: str) -> list[subprocess.Popen[Any]]:
        started: list[subprocess.Popen[Any]] = []

        def start(run: Run, home: Home) -> subprocess.Popen[Any]:
            with open(run.folder / "worker.log", "ab") as log:
                command = [sys.executable, "-c", HEAD + body, str(run.folder)]
                started.append(subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log))
            return started[-1]

        monkeypatch.setattr("tunewright.jobs.launchers.local.start_worker", start)
        return started

    return use


def follow(home: Home, run: Run, terminal: bool = False) -> tuple[Any, str]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    return progress.run_foreground(home, run, console), out.getvalue()


def signal_self(when: Callable[[], bool], numbers: list[int]) -> None:
    """Send signals to this process from a thread, the first one as soon as `when()` is true."""

    def send() -> None:
        deadline = time.monotonic() + 20
        while not when() and time.monotonic() < deadline:
            time.sleep(0.02)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.4)

    threading.Thread(target=send, daemon=True).start()


def has_stepped(run: Run) -> Callable[[], bool]:
    return lambda: any(e.type == "metrics" for e in run.all_events())


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_a_good_run_shows_plan_warnings_and_steps(home: Home, run: Run, worker: Any, terminal: bool) -> None:
    worker(GOOD)
    end, out = follow(home, run, terminal)
    assert end.data == {"status": "succeeded", "steps": 3}
    assert "24 rows" in out and "3 steps" in out and "learning rate 0.001" in out
    assert "Trains 10 of 1,000 parameters (1 %)" in out
    assert "about 3 min 20 s, 1.4 GB of memory, float32, 2 CPU threads" in out
    assert "Warning: row 3 is long" in out
    assert "3/3" in out and "loss 0.3333" in out and "500 tokens/s" in out and "9 s left" in out
    assert "To continue" not in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_first_stop_saves_and_says_how_to_go_on(home: Home, run: Run, worker: Any, number: int) -> None:
    worker(WAITS)
    before = signal.getsignal(number)
    signal_self(has_stepped(run), [number])
    end, out = follow(home, run)
    assert end.data["status"] == "interrupted"
    assert "Stopping after this step and saving a checkpoint." in out
    assert "Stopped after step 2; a checkpoint was saved." in out
    assert f"tunewright train --resume ftjob-1 --home {home.root}" in out
    assert signal.getsignal(number) == before


def test_the_resume_command_names_the_home_only_where_needed(
    home: Home, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEWRIGHT_HOME", str(home.root))
    assert progress.resume_command(home, run) == "tunewright train --resume ftjob-1"
    monkeypatch.setenv("TUNEWRIGHT_HOME", "/elsewhere")
    assert progress.resume_command(Home(Path("/a b")), run) == "tunewright train --resume ftjob-1 --home '/a b'"


def test_a_second_ctrl_c_kills(home: Home, run: Run, worker: Any) -> None:
    started = worker(STUBBORN)
    signal_self(has_stepped(run), [signal.SIGINT, signal.SIGINT])
    end, out = follow(home, run)
    assert started[0].returncode == -signal.SIGKILL
    assert end.data["status"] == "killed"
    assert "Stopping at once." in out and "--resume ftjob-1" in out


def test_a_failed_run_says_why_and_offers_no_resume(home: Home, run: Run, worker: Any) -> None:
    worker(FAILS)
    end, out = follow(home, run)
    assert end.data["status"] == "failed"
    assert "The job failed: The data is bad." in out and "--resume" not in out


def test_a_killed_worker_is_noticed(home: Home, run: Run, worker: Any) -> None:
    worker(KILLED)
    end, out = follow(home, run)
    assert end.type == "end" and end.data["status"] == "killed"
    assert "was killed by SIGKILL" in out and "--resume ftjob-1" in out


def test_a_worker_that_cannot_start_shows_its_last_line(home: Home, run: Run, worker: Any) -> None:
    worker(CRASHES)
    _, out = follow(home, run)
    assert "stopped with exit code 3: ImportError: no torch" in out


def test_a_second_attempt_shows_only_its_own_events(home: Home, run: Run, worker: Any) -> None:
    worker(KILLED)
    follow(home, run)
    worker(GOOD)
    end, out = follow(home, run)
    assert end.attempt == 2 and end.data["status"] == "succeeded"
    assert "killed" not in out


def test_a_run_that_somebody_else_trains_is_refused(home: Home, run: Run, worker: Any) -> None:
    started = worker(GOOD)
    with Lock(run.lock), pytest.raises(Busy, match="ftjob-1 is being trained by another process"):
        follow(home, run)
    assert not started


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert progress.seconds_text(seconds) == text
