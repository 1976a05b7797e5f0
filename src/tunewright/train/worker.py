"""The worker program: `python -m tunewright.train.worker RUN_FOLDER`. One job, one process (group), one exit code.

It reads job.json, holds the run's lock, appends events, writes checkpoints and never opens the database. SIGTERM (or
Ctrl-C) = finish the step, save a checkpoint, exit 75. Exit codes: 0 succeeded, else `exit_code` of core/errors.py.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import psutil

from tunewright.core.durable import Lock, disk_full_is_clear, write_json
from tunewright.core.errors import DiskFull, EndpointDown, Interrupted, OutOfMemory, TunewrightError, is_out_of_memory
from tunewright.core.events import EventWriter
from tunewright.core.home import find_home
from tunewright.core.run import Run

END_STATUS = {DiskFull: "paused", EndpointDown: "paused", Interrupted: "interrupted"}


class Stop:
    """Becomes true when a signal asked the process to stop."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def __call__(self) -> bool:
        return self.asked


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tunewright.train.worker", description="Run one job in its run folder.")
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--home", default=None, help="data folder (default: TUNEWRIGHT_HOME)")
    args = parser.parse_args(argv)
    stop = Stop()
    run = Run(args.run.absolute())
    try:
        with disk_full_is_clear("the run folder"), Lock(run.lock, f"worker {os.getpid()}"):
            return attempt(run, open_attempt(run), args.home, stop)
    except TunewrightError as e:  # before there were events to write it to
        print(e.message, file=sys.stderr)
        return e.exit_code


def open_attempt(run: Run) -> EventWriter:
    """The next attempt's folder, with who works on it, and its events."""
    number = max([0, *run.attempts()]) + 1
    folder = run.attempt(number)
    folder.mkdir(parents=True)
    me = psutil.Process()
    write_json(folder / "worker.json", {"pid": me.pid, "create_time": me.create_time(), "pgid": os.getpgid(0)})
    return EventWriter(folder / "events.jsonl", number)


def attempt(run: Run, events: EventWriter, home: str | None, stop: Stop) -> int:
    """One attempt, from its first event to its `end` event."""
    started = time.monotonic()
    try:
        data = import_run_job()(run, find_home(home), events, stop)
        events.write("message", "The job has successfully completed")
        events.write("end", "succeeded", {**data, "wall_seconds": time.monotonic() - started})
        events.close()
        return 0
    except Exception as e:  # noqa: BLE001 the last line of defence: everything becomes one event and one exit code
        traceback.print_exc()
        return report(events, as_known(e))


def import_run_job() -> Callable[..., dict[str, Any]]:
    """run.run_job. Imported late, so that the lock and worker.json exist within milliseconds.

    Nothing of what 3,000 modules leave in memory is garbage: looking for it takes a fifth of the time of importing them
    and most of the time of every later look.
    """
    gc.disable()
    try:
        from tunewright.train.run import run_job
    finally:
        gc.freeze()
        gc.enable()
    return run_job


def leave(code: int) -> NoReturn:
    """End the process at once: everything is written, and taking the interpreter apart would take a second."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def as_known(error: Exception) -> TunewrightError:
    """The error as one that a user may see; an unexpected one stays in the log with its trace."""
    if isinstance(error, TunewrightError):
        return error
    text = str(error)
    if is_out_of_memory(error):
        return OutOfMemory(
            "The job ran out of memory. Lower micro_batch_tokens or max_length, or use the tuner 'lora'."
        )
    if getattr(error, "errno", None) in (28, 122) or "No space left on device" in text:
        return DiskFull("The disk is full. Nothing already saved was lost. Free some space, then resume the job.")
    return TunewrightError(
        f"The worker failed unexpectedly ({type(error).__name__}). The details are in worker.log of the run.",
        code="internal_error",
    )


def report(events: EventWriter, error: TunewrightError) -> int:
    """Write the `end` event of an attempt that did not succeed; returns the exit code."""
    status = END_STATUS.get(type(error), "failed")
    level = "info" if isinstance(error, Interrupted) else "error"
    data = {"status": status, "code": error.code, "message": error.message, "param": error.param}
    if isinstance(error, DiskFull):
        data["reason"] = "disk_full"
    try:
        events.write("end", error.message, data, level)
        events.close()
    except DiskFull:
        print(error.message, file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    leave(main())
