"""Children are restarted when they die, not when their input is bad, and none outlives the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tunewright.cli import processes
from tunewright.cli.processes import Child, pause_after, stop_all, tend

FOREVER = "import time\nwhile True: time.sleep(0.05)"
STUBBORN = f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\n{FOREVER}"


def wait_for(true: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@pytest.fixture
def child() -> Iterator[Callable[[str], Child]]:
    made: list[Child] = []

    def make(code: str) -> Child:
        made.append(Child("thing", [sys.executable, "-c", code], dict(os.environ)))
        return made[-1]

    yield make
    stop_all(made, 0, lambda: True)


def test_a_dead_child_is_started_again_after_a_pause(
    child: Callable[[str], Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "FIRST_PAUSE_S", 0.2)
    said: list[str] = []
    thing = child(FOREVER)
    assert tend(thing, said.append) is None and thing.process is not None
    first = thing.process.pid
    thing.process.kill()
    thing.process.wait()
    tend(thing, said.append)
    assert said == ["The thing was killed by SIGKILL. Starting it again in 0.2 s."]
    tend(thing, said.append)
    assert thing.process is None, "the pause is not over yet"
    time.sleep(0.25)
    tend(thing, said.append)
    assert thing.running() and thing.process.pid != first


def test_the_pause_grows_and_a_steady_child_starts_afresh(
    child: Callable[[str], Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [pause_after(n) for n in (1, 2, 3, 9)] == [1, 2, 4, 30]
    thing = child(FOREVER)
    thing.failures = 4
    tend(thing, print)
    tend(thing, print)
    assert thing.failures == 4
    monkeypatch.setattr(processes, "STEADY_AFTER_S", 0.0)
    tend(thing, print)
    assert thing.failures == 0


@pytest.mark.parametrize(("code", "final"), [(65, True), (69, True), (2, True), (70, False), (1, False), (0, False)])
def test_bad_input_is_not_tried_again(child: Callable[[str], Child], code: int, final: bool) -> None:
    thing = child(f"raise SystemExit({code})")
    tend(thing, print)
    assert thing.process is not None
    thing.process.wait()
    assert tend(thing, lambda _: None) == (code if final else None)


def test_a_child_that_does_not_stop_is_killed(child: Callable[[str], Child]) -> None:
    thing = child(FOREVER.replace("import time", STUBBORN.partition("\nwhile")[0]))
    thing.start()
    assert thing.process is not None
    time.sleep(0.5)
    stop_all([thing], 0.3, lambda: False)
    assert thing.process.returncode == -signal.SIGKILL


def test_a_child_that_stops_by_itself_is_left_to_it(child: Callable[[str], Child]) -> None:
    thing = child("import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(7))\ntime.sleep(60)")
    thing.start()
    assert thing.process is not None
    time.sleep(0.5)
    stop_all([thing], 20, lambda: False)
    assert thing.process.returncode == 7


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_children_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\nfrom tunewright.cli.processes import Child\n"
        f"c = Child('x', [sys.executable, '-c', {FOREVER!r}], dict(os.environ)); c.start()\n"
        "print(c.process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.kill()
    parent.wait()
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
