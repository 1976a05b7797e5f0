"""The supervisor: validates, starts, watches, pauses and ends jobs. A task inside the one server process.

It keeps nothing that a restart could lose: `tick()` looks at the store and at the run folders and does what follows.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from tunewright.core.errors import Busy, DiskFull, NotFound, StateError, TunewrightError
from tunewright.core.home import Home
from tunewright.core.run import Run
from tunewright.jobs import chains, exits, foreground, space
from tunewright.jobs.checking import check_data
from tunewright.jobs.journal import Line
from tunewright.jobs.launchers import LAUNCHERS, Launcher
from tunewright.jobs.prepare import sweep_unfinished
from tunewright.jobs.rows import TERMINAL, WITH_WORKER, JobRow
from tunewright.jobs.store import Store

log = logging.getLogger(__name__)

# seconds after SIGTERM until the whole process group is killed
PATIENCE = {"pause": 30.0, "cancel": 10.0}
CANCEL_AT_ONCE = frozenset({"validating_files", "queued", "paused"})
FOREGROUND_EVERY_S = 2.0
TROUBLE_S = 5.0
KILL_S = 10.0


class Supervisor:
    """One per store. `run()` loops until cancelled; workers go on without it and are found again by the next one.

    check: validates the data of a run, raising TunewrightError. max_running: jobs that train at the same time.
    backoff: seconds to wait before the attempt after the first, second, … crash without progress in between.
    """

    def __init__(
        self,
        store: Store,
        home: Home,
        launcher: Launcher | None = None,
        clock: Callable[[], float] = time.time,
        *,
        check: Callable[[Home, Run], None] = check_data,
        max_running: int = 1,
        backoff: tuple[float, ...] = (2.0, 10.0, 40.0),
        patience: dict[str, float] | None = None,
        poll: float = 0.5,
    ) -> None:
        self.store = store
        self.home = home
        self.launcher: Launcher = launcher or LAUNCHERS.load("local")
        self.clock = clock
        self.max_running = max_running
        self._check = check
        self._backoff = backoff
        self._patience = patience or PATIENCE
        self._poll = poll
        self._pool = ThreadPoolExecutor(1, "validate")
        self._checking: dict[str, Future[None]] = {}
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._asked: dict[str, float] = {}
        self._looked_for_foreground = float("-inf")
        self._stopping = False
        self._wake: asyncio.Event | None = None

    # ---- the loop ----

    async def run(self) -> None:
        """Tick until cancelled. Workers are left alone."""
        self._wake = asyncio.Event()
        await asyncio.to_thread(sweep_unfinished, self.home)
        try:
            while True:
                self._wake.clear()
                wait = self._poll
                try:
                    await _to_its_end(asyncio.to_thread(self.tick))
                except (TunewrightError, OSError, SQLAlchemyError):
                    log.exception("the supervisor could not do its work; it tries again")
                    wait = TROUBLE_S
                try:
                    await asyncio.wait_for(self._wake.wait(), wait)
                except TimeoutError:
                    continue
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def tick(self) -> None:
        """One look at everything. Takes milliseconds; call it from one thread at a time."""
        validating = self.store.jobs_with({"validating_files"})
        self._checking = {j.id: self._checking[j.id] for j in validating if j.id in self._checking}
        self._each(validating, self._validate)
        self._each(self.store.jobs_with(WITH_WORKER), self._watch)
        self._each(self.store.jobs_with({"paused"}), self._look_at_paused)
        self._each(self.store.jobs_with({"queued"}), self._start)
        if time.monotonic() - self._looked_for_foreground > FOREGROUND_EVERY_S:
            self._looked_for_foreground = time.monotonic()
            foreground.adopt(self.store, self.launcher)

    def _each(self, jobs: list[JobRow], act: Callable[[JobRow], None]) -> None:
        """Do `act` to every job; one that cannot be handled does not hold up the others."""
        for job in jobs:
            try:
                act(job)
            except (DiskFull, Busy) as e:
                log.warning("%s: %s", job.id, e.message)  # the next tick tries again
            except (TunewrightError, OSError, ValueError) as e:
                log.exception("job %s cannot be handled", job.id)
                if not self.launcher.alive(self.store.run(job.id)):
                    text = e.message if isinstance(e, TunewrightError) else "Its run folder cannot be read."
                    self._fail(job, "internal_error", f"The job cannot go on. {text}")

    # ---- validating ----

    def _validate(self, job: JobRow) -> None:
        done = self._checking.get(job.id)
        if done is None:
            files = f"Validating training file: {job.training_file}"
            files += f" and validation file: {job.validation_file}" if job.validation_file else ""
            if not self.store.has_event(job.id, files):
                self.store.add_event(job.id, "info", files)
            self._checking[job.id] = self._pool.submit(self._check, self.home, self.store.run(job.id))
        elif done.done():
            del self._checking[job.id]
            try:
                done.result()
            except TunewrightError as e:
                self._fail(job, e.code, e.message, e.param)
            else:
                say = [Line("Files validated, moving job to queued state")]
                self.store.update_job(job.id, {"validating_files"}, say=say, status="queued")

    # ---- starting ----

    def _start(self, job: JobRow) -> None:
        if job.is_chain:
            self.store.update_job(job.id, {"queued"}, status="running")
            return
        run = self.store.run(job.id)
        if self.launcher.alive(run):
            self._attach(job, run)
            return
        waits = (job.retry or {}).get("not_before", 0.0) > self.clock()
        running = [j for j in self.store.jobs_with(WITH_WORKER) if not j.is_chain]
        if waits or self._stopping or len(running) >= self.max_running:
            return
        attempt = max(run.attempts(), default=0) + 1
        if not self.store.update_job(job.id, {"queued"}, status="running", attempt=attempt, error=None):
            return
        try:
            self._children[job.id] = self.launcher.start(run, self.home)
        except (TunewrightError, OSError) as e:
            case = exits.Case(job, run, exits.Exit(None, None), self.store, self.clock(), self._backoff)
            changes, say = exits.not_started(case, e)
            self.store.update_job(job.id, {"running"}, say=say, **changes)

    def _attach(self, job: JobRow, run: Run) -> None:
        """Somebody else, such as `tunewright train --resume`, has begun to work on the job."""
        attempt = max(run.attempts(), default=0)
        self.store.update_job(job.id, {"queued", "paused"}, status="running", attempt=attempt, error=None)

    # ---- watching ----

    def _watch(self, job: JobRow) -> None:
        if job.is_chain:
            chains.follow(self, job)
            return
        run, child = self.store.run(job.id), self._children.get(job.id)
        code = None if child is None else child.poll()  # asked before reading, so that the last lines are not missed
        alive = self.launcher.alive(run)
        self._take_events(job)
        if not alive and (child is None or code is not None):
            self._ended(job, run, code)
        elif not self.launcher.leader_alive(run) and (child is None or code is not None):
            self.launcher.signal(run, signal.SIGKILL)  # what the worker left behind
        elif job.intent is not None:
            self._press(job, run)

    def _take_events(self, job: JobRow) -> None:
        steps = [e for e in self.store.catch_up(job.id) if e.type == "metrics" and e.data.get("eta_s") is not None]
        if steps:
            finish = int(steps[-1].time + steps[-1].data["eta_s"])
            if abs(finish - (job.estimated_finish or 0)) > 1:
                self.store.update_job(job.id, {"running", "pausing"}, estimated_finish=finish)

    def _press(self, job: JobRow, run: Run) -> None:
        """SIGTERM once, SIGKILL when patience is over."""
        now = time.monotonic()
        asked = self._asked.setdefault(job.id, now)
        if asked == now:
            self.launcher.signal(run, signal.SIGTERM)
        elif now - asked > self._patience[job.intent or "cancel"]:
            self.launcher.signal(run, signal.SIGKILL)

    def _ended(self, job: JobRow, run: Run, code: int | None) -> None:
        """The worker is gone, and everything it started."""
        exit = exits.read(run, job.attempt, code)
        fresh = self.store.get_job(job.id)
        if fresh is None or fresh.status not in WITH_WORKER:
            return
        changes, say = exits.outcome(fresh, run, exit, self.store, self.clock(), self._backoff)
        if self.store.update_job(job.id, {fresh.status}, say=say, **changes):
            self._children.pop(job.id, None)
            self._asked.pop(job.id, None)

    def _look_at_paused(self, job: JobRow) -> None:
        if job.is_chain:
            chains.follow(self, job)
            return
        run = self.store.run(job.id)
        if self.launcher.alive(run):
            self._attach(job, run)
        elif space.waits_for(job) and job.started_by == "api" and space.enough(self.home, run, space.AUTOMATIC_BYTES):
            say = [Line("There is space on the disk again; the job goes on.")]
            self.store.update_job(job.id, {"paused"}, say=say, status="queued", error=None)

    def _fail(self, job: JobRow, code: str | None, message: str, param: str | None = None) -> None:
        changes, say = exits.failed(code, message, param, self.clock())
        self.store.update_job(job.id, {job.status}, say=say, **changes)

    # ---- what people ask for ----

    async def request_cancel(self, job_id: str) -> None:
        """Cancel a job: at once if no worker runs, else when its worker is gone. Raises StateError, NotFound."""
        await asyncio.to_thread(self.cancel, job_id)
        self._look_now()

    async def request_pause(self, job_id: str) -> None:
        """Let a running job finish its step, save and end. Raises StateError, NotFound."""
        await asyncio.to_thread(self.pause, job_id)
        self._look_now()

    async def request_resume(self, job_id: str) -> None:
        """Put a paused job back into the queue. Raises StateError (also while the disk is still full), NotFound."""
        await asyncio.to_thread(self.resume, job_id)
        self._look_now()

    def cancel(self, job_id: str) -> None:
        """As request_cancel, from any thread."""
        while True:
            job = self._job(job_id)
            if job.status in TERMINAL:
                raise StateError(f"The job {job_id} has already {_has(job.status)}; it cannot be cancelled.")
            if job.status == "cancelling":
                return
            if job.is_chain:
                chains.stop_at_once(self, job)
            if job.status in CANCEL_AT_ONCE:
                changes, say = exits.cancelled(self.clock())
            else:
                changes, say = {"status": "cancelling", "intent": "cancel"}, []
            if self.store.update_job(job_id, {job.status}, say=say, **changes):
                self._asked.pop(job_id, None)
                return

    def pause(self, job_id: str) -> None:
        """As request_pause, from any thread."""
        if not self.store.update_job(job_id, {"running"}, status="pausing", intent="pause"):
            job = self._job(job_id)
            if job.status != "pausing":
                raise StateError(
                    f"The job {job_id} is {_is(job.status)}; only a running job can be paused."
                    + (" Cancel it if it should not start." if job.status in ("queued", "validating_files") else "")
                )

    def resume(self, job_id: str) -> None:
        """As request_resume, from any thread."""
        job = self._job(job_id)
        if job.is_chain:
            chains.resume(self, job)
            return
        if job.status != "paused":
            more = " It is saving a checkpoint; try again in a moment." if job.status == "pausing" else ""
            raise StateError(f"The job {job_id} is {_is(job.status)}; only a paused job can be resumed.{more}")
        if space.waits_for(job):
            space.require(self.home, self.store.run(job_id))
        say = [Line("Fine-tuning job resumed")]
        self.store.update_job(job_id, {"paused"}, say=say, status="queued", intent=None, error=None, retry=None)

    def stop_workers(self, timeout: float = 30.0) -> None:
        """Ask every worker to save and end; they go on when the next server starts. For a planned shutdown.

        Those that need longer than `timeout` seconds are killed. Nothing is started afterwards.
        """
        self._stopping = True
        runs = [self.store.run(job.id) for job in self.store.jobs_with(WITH_WORKER) if job.started_by == "api"]
        for number, patience in ((signal.SIGTERM, timeout), (signal.SIGKILL, KILL_S)):
            for run in runs:
                self.launcher.signal(run, number)
            end = time.monotonic() + patience
            while any(self.launcher.alive(run) for run in runs) and time.monotonic() < end:
                time.sleep(0.05)

    def _job(self, job_id: str) -> JobRow:
        job = self.store.get_job(job_id)
        if job is None:
            raise NotFound(f"Could not find fine tune: {job_id}", param="fine_tune_id", code="fine_tune_not_found")
        return job

    def _look_now(self) -> None:
        if self._wake is not None:
            self._wake.set()


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await `work`; when cancelled meanwhile, let it come to its end first."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _is(status: str) -> Any:
    return "validating its files" if status == "validating_files" else status


def _has(status: str) -> str:
    return "been cancelled" if status == "cancelled" else status
