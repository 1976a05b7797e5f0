"""How an attempt ended and what follows for the job: one table of exit codes, one function for each kind."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tunewright.core.durable import check_folder
from tunewright.core.errors import (
    CheckpointError,
    DiskFull,
    Diverged,
    EndpointDown,
    Interrupted,
    OutOfMemory,
    SpecError,
    TunewrightError,
    UserError,
)
from tunewright.core.events import Event, read_events
from tunewright.core.run import Run
from tunewright.jobs import results
from tunewright.jobs.journal import Line
from tunewright.jobs.rows import JobRow
from tunewright.jobs.store import Store

MAX_CRASHES = 3
# errors after which a job pauses by itself, by their code
PAUSING: dict[str | None, type[TunewrightError]] = {e.code: e for e in (DiskFull, EndpointDown)}
Outcome = tuple[dict[str, Any], list[Line]]


@dataclass(frozen=True)
class Exit:
    """code: the exit code, negative for a signal, None when nobody saw it. end: the attempt's `end` event, if any."""

    code: int | None
    end: Event | None


@dataclass(frozen=True)
class Case:
    """What an outcome is made from."""

    job: JobRow
    run: Run
    exit: Exit
    store: Store
    now: float
    backoff: tuple[float, ...]

    @property
    def end(self) -> dict[str, Any]:
        return self.exit.end.data if self.exit.end else {}


def read(run: Run, attempt: int, code: int | None) -> Exit:
    """How attempt `attempt` (or a later one) ended.

    The `end` event tells an exit code that nobody saw, and counts more than a signal that came after it.
    """
    last = max(run.attempts(), default=0)
    lines = read_events(run.attempt(last) / "events.jsonl", last)[0] if last >= max(attempt, 1) else []
    end = lines[-1] if lines and lines[-1].type == "end" else None
    if end is not None and (code is None or code < 0):
        code = _code_of(end)
    return Exit(code, end)


def _code_of(end: Event) -> int:
    why = PAUSING.get(end.data.get("code"), DiskFull)
    by_status = {"succeeded": 0, "paused": why.exit_code, "interrupted": Interrupted.exit_code}
    unexpected = TunewrightError.exit_code if end.data.get("code") == "internal_error" else UserError.exit_code
    return by_status.get(end.data["status"], unexpected)


def outcome(job: JobRow, run: Run, exit: Exit, store: Store, now: float, backoff: tuple[float, ...]) -> Outcome:
    """The changes of the job's row, and what to say, after its worker is gone."""
    kind: Callable[[Case], Outcome] = EXITS.get(exit.code, _crashed)
    return kind(Case(job, run, exit, store, now, backoff))


def cancelled(now: float) -> Outcome:
    done = {"status": "cancelled", "intent": None, "finished_at": int(now), "estimated_finish": None}
    return done, [Line("Fine-tuning job cancelled")]


def failed(code: str | None, message: str, param: str | None, now: float) -> Outcome:
    error = {"code": code or "server_error", "message": message, "param": param}
    done = {"status": "failed", "intent": None, "error": error, "finished_at": int(now), "estimated_finish": None}
    return done, [Line(message, "error", data={"error_code": error["code"]})]


def paused(*say: Line, error: dict[str, Any] | None = None) -> Outcome:
    return {"status": "paused", "intent": None, "error": error, "estimated_finish": None}, list(say)


def not_started(case: Case, error: TunewrightError | OSError) -> Outcome:
    """The worker could not be started: a full disk pauses the job, anything else counts as a crash."""
    if isinstance(error, DiskFull):
        return paused(Line(error.message, "error"), error=error.to_openai())
    reason = error.message if isinstance(error, TunewrightError) else error.strerror or str(error)
    return _crashed(case, f"The worker could not be started: {reason.rstrip('.')}.")


def _succeeded(case: Case) -> Outcome:
    """Only a result whose every byte is as the worker wrote it is a success."""
    if case.job.intent == "cancel":
        return cancelled(case.now)
    try:
        check_folder(case.run.result)
    except CheckpointError as e:
        return _crashed(case, f"The worker ended, but its result is not whole: {e.message}")
    done = {
        "status": "succeeded",
        "intent": None,
        "error": None,
        "retry": None,
        "finished_at": int(case.exit.end.time if case.exit.end else case.now),
        "estimated_finish": None,
        "trained_tokens": case.end.get("trained_tokens"),
        "result_files": results.register(case.store, case.job, case.run),
    }
    return done, []


def _interrupted(case: Case) -> Outcome:
    """Stopped after saving: because we asked, or because somebody else sent SIGTERM."""
    if case.job.intent == "cancel":
        return cancelled(case.now)
    if case.job.intent == "pause":
        return paused(Line("Fine-tuning job paused"))
    if case.job.started_by == "foreground":
        return paused(Line("The job was stopped in the terminal; it can be resumed."))
    say = [Line("The worker was stopped; the job goes on from its last checkpoint.", "warn")]
    return {"status": "queued", "estimated_finish": None}, say


def _endpoint_down(case: Case) -> Outcome:
    if case.job.intent == "cancel":
        return cancelled(case.now)
    message = case.end.get("message") or "A server that the job asks does not answer. Resume the job later."
    return paused(Line(message, "error"), error=EndpointDown(message).to_openai())


def _disk_full(case: Case) -> Outcome:
    if case.job.intent == "cancel":
        return cancelled(case.now)
    message = case.end.get("message") or (
        "The disk is full. Nothing already saved was lost. Free some space, then resume the job."
    )
    return paused(Line(message, "error"), error=DiskFull(message).to_openai())


def _reported(case: Case) -> Outcome:
    """The worker said what was wrong; trying again would not help."""
    if case.job.intent == "cancel":
        return cancelled(case.now)
    message = case.end.get("message") or f"The worker ended with the exit code {case.exit.code}."
    return failed(case.end.get("code"), message, case.end.get("param"), case.now)


def _crashed(case: Case, what: str | None = None) -> Outcome:
    """Killed or broken: go on from the last checkpoint, at most MAX_CRASHES times without progress."""
    if case.job.intent == "cancel":
        return cancelled(case.now)
    never_began = what is None and case.exit.code is None and max(case.run.attempts(), default=0) < case.job.attempt
    what = what or _how(case)
    if case.job.intent == "pause" or case.job.started_by == "foreground":
        return paused(Line(f"{what} The job can be resumed from its last checkpoint.", "warn"))
    if never_began:
        return {"status": "queued"}, []  # the server died before it had started the worker
    step, before = newest_step(case.run), case.job.retry or {"count": 0, "step": -1}
    count = 1 if step > before["step"] else before["count"] + 1
    if count > MAX_CRASHES:
        code = case.end.get("code") or "worker_crashed"
        text = f"{what} This happened {count} times at step {step} without progress.{_advice(case)}"
        return failed(code, text, None, case.now)
    wait = case.backoff[min(count, len(case.backoff)) - 1]
    where = f"its checkpoint at step {step}" if step > 0 else "the start"
    retry = {"count": count, "step": step, "not_before": case.now + wait}
    say = [Line(f"{what} The job goes on from {where}.", "warn")]
    return {"status": "queued", "estimated_finish": None, "retry": retry}, say


def _how(case: Case) -> str:
    code = case.exit.code
    if case.end.get("message"):
        return str(case.end["message"])
    if code is None:
        return "The worker ended unexpectedly."
    if code < 0:
        return f"The worker was killed by the signal {signal.Signals(-code).name}."
    return f"The worker ended unexpectedly with the exit code {code}."


def _advice(case: Case) -> str:
    if case.exit.code == -signal.SIGKILL:
        return (
            " Perhaps the machine ran out of memory: lower micro_batch_tokens or max_length, or use the tuner 'lora'."
        )
    return " worker.log in the run folder has the details."


def newest_step(run: Run) -> int:
    """The step of the newest checkpoint folder, 0 when there is none."""
    names = [p.name for p in run.checkpoints.iterdir()] if run.checkpoints.is_dir() else []
    return max((int(n[5:]) for n in names if n.startswith("step-") and n[5:].isdigit()), default=0)


# every other code, and every signal, is a crash
EXITS: dict[int | None, Callable[[Case], Outcome]] = {
    0: _succeeded,
    SpecError.exit_code: _reported,
    UserError.exit_code: _reported,
    OutOfMemory.exit_code: _reported,
    Diverged.exit_code: _reported,
    DiskFull.exit_code: _disk_full,
    EndpointDown.exit_code: _endpoint_down,
    CheckpointError.exit_code: _reported,
    Interrupted.exit_code: _interrupted,
}
