"""Child processes that are kept alive: started in their own session, restarted with a growing pause, stopped in order.

A child that ends with one of the exit codes for bad input (port or folder in use, not writable) is not restarted: it
has said on stderr what is wrong, and trying again unchanged will not help.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
STEADY_AFTER_S = 60.0
FINAL_CODES = frozenset({2, 64, 65, 69, 73})  # usage, bad input, busy, disk full
PR_SET_PDEATHSIG = 1


@dataclass
class Child:
    """One program to keep running.

    log: where its output goes; errors go to our stderr. failures: deaths in a row. start_at: when to start next.
    """

    name: str
    command: Sequence[str]
    env: Mapping[str, str]
    log: Path | None = None
    process: subprocess.Popen[Any] | None = None
    failures: int = 0
    start_at: float = 0.0
    started: float = field(default=0.0)

    def start(self) -> None:
        with open(self.log or os.devnull, "ab") as log:
            self.process = subprocess.Popen(
                list(self.command),
                env=dict(self.env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                start_new_session=True,  # Ctrl-C on the terminal reaches us only; we stop the children in order
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        self.started = time.monotonic()

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None


def _die_with_parent() -> None:
    """Linux: if this command is killed, its children get SIGTERM and so save and end as usual."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def pause_after(failures: int) -> float:
    """Seconds before the next start after `failures` deaths in a row: 1, 2, 4 … 30."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (failures - 1))


def how_it_ended(code: int) -> str:
    """`was killed by SIGKILL` or `stopped with exit code 70`."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"stopped with exit code {code}"


def tend(child: Child, say: Callable[[str], None]) -> int | None:
    """Restart the child if it died and its pause is over. Returns its exit code when it must not be restarted."""
    now = time.monotonic()
    if child.running():
        if now - child.started > STEADY_AFTER_S:
            child.failures = 0
        return None
    if child.process is not None:
        code = child.process.returncode
        if code in FINAL_CODES:
            return code
        child.process, child.failures = None, child.failures + 1
        child.start_at = now + pause_after(child.failures)
        say(f"The {child.name} {how_it_ended(code)}. Starting it again in {pause_after(child.failures):g} s.")
    elif now >= child.start_at:
        child.start()
    return None


def stop_all(children: Sequence[Child], patience_s: float, hurry: Callable[[], bool]) -> None:
    """SIGTERM to each in order, then SIGKILL to what is left after `patience_s` or as soon as `hurry()` is true."""
    alive = [c.process for c in children if c.process is not None and c.running()]
    for process in alive:
        process.terminate()
    deadline = time.monotonic() + patience_s
    while any(p.poll() is None for p in alive) and time.monotonic() < deadline and not hurry():
        time.sleep(0.05)
    for process in alive:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def child_env(home: Path) -> dict[str, str]:
    """Our environment with the data folder set, and output that is not held back."""
    return {**os.environ, "TUNEWRIGHT_HOME": str(home), "PYTHONUNBUFFERED": "1"}
