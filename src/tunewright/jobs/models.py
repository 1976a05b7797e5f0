"""The models that a job left: its result and the epoch checkpoints that are still on the disk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

from tunewright.core.durable import discard
from tunewright.core.errors import StateError
from tunewright.core.ids import ALPHABET, parse_model_name
from tunewright.core.run import ARTEFACT, Run, read_artefact
from tunewright.jobs.rows import TERMINAL, CheckpointRow, EventRow, JobRow, ModelRow


def stable_id(prefix: str, *parts: object) -> str:
    """An id that is always the same for the same parts: prefix plus 24 base62 characters of their sha256."""
    number = int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest(), "big")
    digits = []
    for _ in range(24):
        number, digit = divmod(number, len(ALPHABET))
        digits.append(ALPHABET[digit])
    return prefix + "".join(digits)


def final_name(name: str) -> str:
    """The name of the finished model that a checkpoint's name belongs to; any other name as it is."""
    parsed = parse_model_name(name)
    return name if parsed is None else str(replace(parsed, step=None))


@dataclass(frozen=True)
class Left:
    """One thing a job left, as a checkpoint and as a model."""

    checkpoint: CheckpointRow
    model: ModelRow


def of_job(run: Run, job: JobRow, saved: list[EventRow]) -> list[Left]:
    """What the job left, newest first. saved: its checkpoint events, oldest first; a later one of a step counts."""
    by_step = {e.data["step"]: e for e in saved}
    final = _final(run, job, by_step)
    epochs = {e.data["step"]: e for e in saved if e.data.get("kind") == "epoch"}
    if final is not None:
        epochs.pop(final.model.step, None)
    rest = [_epoch(run, job, step, epochs[step]) for step in sorted(epochs, reverse=True)]
    return [x for x in [final, *rest] if x is not None]


def remove(run: Run, job: JobRow, row: ModelRow) -> None:
    """Delete a model's folder. Raises StateError while the job may still continue from it."""
    if job.status not in TERMINAL:
        raise StateError(
            f"The model '{row.name}' cannot be deleted while its job {job.id} is {job.status}. Cancel the job first.",
            param="model",
        )
    discard(run.result if row.name == job.name else run.checkpoint(row.step))


def _final(run: Run, job: JobRow, saved: dict[int, EventRow]) -> Left | None:
    if job.status != "succeeded" or not (run.result / ARTEFACT).is_file():
        return None
    artefact = read_artefact(run.result)
    metrics = saved[artefact.step].data.get("metrics", {}) if artefact.step in saved else artefact.metrics
    return _left(job, job.name, run.result, artefact.step, metrics, job.finished_at or job.created_at)


def _epoch(run: Run, job: JobRow, step: int, event: EventRow) -> Left | None:
    folder = run.checkpoint(step) / "artefact"
    if not (folder / ARTEFACT).is_file():
        return None
    return _left(job, f"{job.name}:ckpt-step-{step}", folder, step, event.data.get("metrics", {}), event.created_at)


def _left(job: JobRow, name: str, folder: Any, step: int, metrics: dict[str, Any], created_at: int) -> Left:
    return Left(
        CheckpointRow(stable_id("ftckpt_", name), created_at, name, step, metrics, job.id),
        ModelRow(name, created_at, str(folder), job.base, job.id, step),
    )
