"""Launchers: where workers run. One row each; a launcher starts a worker, says whether it lives, and signals it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass

from tunewright.core.home import Home
from tunewright.core.registry import Table
from tunewright.core.run import Run

LAUNCHERS = Table("launcher", {"local": "tunewright.jobs.launchers.local:LAUNCHER"})


@dataclass(frozen=True)
class Launcher:
    """start: begin an attempt. leader_alive: the worker itself lives. alive: it or anything it started lives.
    signal: send a signal to all of that; nothing happens when it is gone."""

    start: Callable[[Run, Home], subprocess.Popen[bytes]]
    leader_alive: Callable[[Run], bool]
    alive: Callable[[Run], bool]
    signal: Callable[[Run, int], None]
