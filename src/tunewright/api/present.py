"""Rows of the store as OpenAI's objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from tunewright.api.schemas import (
    File,
    Hyperparameters,
    Job,
    JobCheckpoint,
    JobError,
    JobEvent,
    ListPage,
    Model,
    Recipe,
)
from tunewright.api.state import ORGANIZATION_ID
from tunewright.core.run import ARTEFACT, read_artefact
from tunewright.engine.recipes.base import recipe_of
from tunewright.jobs.rows import CheckpointRow, EventRow, FileRow, JobRow, ModelRow, Page
from tunewright.models.catalogue import ModelInfo

# what OpenAI has no word for is still running to its clients
SHOWN_STATUS = {"cancelling": "running", "pausing": "running"}

R = TypeVar("R")


def page(rows: Page[R], show: Callable[[R], Any]) -> ListPage[Any]:
    """A list reply; the ids of its ends are the cursors."""
    data = [show(row) for row in rows.data]
    ends = {"first_id": data[0].id, "last_id": data[-1].id} if data else {}
    return ListPage[Any](data=data, has_more=rows.has_more, **ends)


def file(row: FileRow) -> File:
    return File(
        id=row.id,
        bytes=row.bytes,
        created_at=row.created_at,
        expires_at=row.expires_at,
        filename=row.filename,
        purpose=row.purpose,
        status=row.status,  # pyright: ignore[reportArgumentType]
        status_details=row.status_details,
    )


def job(row: JobRow) -> Job:
    """The job as OpenAI shows it: `auto` gives way to numbers once the worker has resolved them."""
    resolved = row.resolved or {}
    of_method = {**row.spec["objective"], **resolved} if resolved else {}
    if "eval_every" in of_method:
        of_method["eval_interval"] = of_method["eval_every"]  # OpenAI's name for it
    return Job(
        id=row.id,
        created_at=row.created_at,
        error=_error(row),
        estimated_finish=row.estimated_finish if row.status in ("running", "pausing") else None,
        fine_tuned_model=_result(row) if row.status == "succeeded" else None,
        finished_at=row.finished_at,
        hyperparameters=Hyperparameters(**_numbers(row.hyperparameters, resolved)),
        integrations=row.integrations or [],
        metadata=row.metadata,
        method=_method(row.method, of_method),
        model=row.model,
        organization_id=ORGANIZATION_ID,
        result_files=row.result_files,
        seed=row.seed,
        status=SHOWN_STATUS.get(row.status, row.status),  # pyright: ignore[reportArgumentType]
        trained_tokens=row.trained_tokens,
        training_file=row.training_file,
        user_provided_suffix=row.suffix,
        validation_file=row.validation_file,
        tunewright=row.tunewright or {},
    )


def _result(row: JobRow) -> str:
    """The model that a job left; a chain's is its last stage's."""
    return row.tunewright["stages"][-1]["fine_tuned_model"] if row.is_chain and row.tunewright else row.name


def _error(row: JobRow) -> JobError | None:
    if not row.error:
        return None
    found = row.error
    return JobError(code=found.get("code") or "server_error", message=found["message"], param=found.get("param"))


def _numbers(asked: dict[str, Any], resolved: dict[str, Any]) -> dict[str, Any]:
    return {name: resolved.get(name, value) if value == "auto" else value for name, value in asked.items()}


def _method(method: dict[str, Any] | None, resolved: dict[str, Any]) -> dict[str, Any] | None:
    if method is None:
        return None
    kind = method["type"]
    block = method[kind]
    return {"type": kind, kind: {**block, "hyperparameters": _numbers(block["hyperparameters"], resolved)}}


def event(row: EventRow) -> JobEvent:
    return JobEvent(
        id=row.id,
        created_at=row.created_at,
        level=row.level,  # pyright: ignore[reportArgumentType]
        message=row.message,
        type="metrics" if row.type == "metrics" else "message",
        data=row.data,
    )


def checkpoint(row: CheckpointRow) -> JobCheckpoint:
    numbers = {k: float(v) for k, v in row.metrics.items() if isinstance(v, int | float)}
    return JobCheckpoint(
        id=row.id,
        created_at=row.created_at,
        fine_tuned_model_checkpoint=row.name,
        fine_tuning_job_id=row.job_id,
        metrics=numbers,
        step_number=row.step,
    )


def models(bases: Iterable[ModelInfo], tuned: Iterable[ModelRow]) -> list[Model]:
    """Base models, then what jobs left. A base that would have to be downloaded is not shown."""
    shown = [base_model(info) for info in bases if not info.needs_network]
    return shown + [tuned_model(row) for row in tuned]


def base_model(info: ModelInfo) -> Model:
    return Model(id=info.name, created=info.created, owned_by="system")


def tuned_model(row: ModelRow) -> Model:
    return Model(id=row.name, created=row.created_at, owned_by=ORGANIZATION_ID)


def recipe(folder: Path) -> Recipe:
    """A recipe's folder as its object. Models that are folders of this machine are shown by their last part."""
    record = read_artefact(folder)
    names = {"encoder", *recipe_of(record).card.models}
    return Recipe(
        id=record.name,
        created_at=int((folder / ARTEFACT).stat().st_mtime),
        model=_without_path(record.base),
        recipe={k: _without_path(v) if k in names else v for k, v in (record.recipe or {}).items()},
        decoding=record.decoding,
    )


def _without_path(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_path(v) for v in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
