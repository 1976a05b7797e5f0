"""The rows of the store and the tables behind them, and which status may follow which."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from sqlalchemy import (
    JSON,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
)

TRANSITIONS: dict[str, frozenset[str]] = {
    "validating_files": frozenset({"queued", "failed", "cancelled"}),
    "queued": frozenset({"running", "paused", "failed", "cancelled"}),  # paused: a stage of a chain that is to rest
    "running": frozenset({"pausing", "paused", "cancelling", "succeeded", "failed", "queued"}),
    "pausing": frozenset({"paused", "cancelling", "succeeded", "failed"}),
    "paused": frozenset({"queued", "running", "cancelled", "succeeded", "failed"}),
    "cancelling": frozenset({"cancelled"}),
    "cancelled": frozenset(),
    "succeeded": frozenset(),
    "failed": frozenset({"running"}),  # a chain, whose failed stage is done again
}
STATUSES = tuple(TRANSITIONS)
TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
WITH_WORKER = frozenset({"running", "pausing", "cancelling"})

T = TypeVar("T")


@dataclass(frozen=True)
class Page(Generic[T]):
    """One page of a list. has_more: whether rows follow the last one of `data`."""

    data: list[T]
    has_more: bool


@dataclass(frozen=True)
class FileRow:
    """An uploaded or produced file; its bytes lie at home.blob(sha256). Times are Unix seconds."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    sha256: str
    expires_at: int | None = None
    status: str = "processed"
    status_details: str | None = None


@dataclass(frozen=True)
class JobRow:
    """A job. Times are Unix seconds.

    intent: `pause` or `cancel` while the worker is being stopped for that, else None.
    model: as the request gave it. base: the weights below. name: the `ft:` name the finished model has.
    spec: the job spec as plain data. method, hyperparameters, integrations, tunewright: as requested.
    resolved: the worker's plan (n_epochs, batch_size, learning_rate, learning_rate_multiplier, total_steps, …).
    error: {code, message, param} of a failed job, or of one that paused because the disk was full.
    retry: {count, not_before, step}: crashes since the last progress, and when the next attempt may start.
    started_by: `api` or `foreground`.
    A chain has also `stages` in its spec, and in `tunewright` the list of them as people see it.
    """

    id: str
    created_at: int
    model: str
    base: str
    name: str
    training_file: str
    spec: dict[str, Any]
    seed: int
    status: str = "validating_files"
    finished_at: int | None = None
    intent: str | None = None
    validation_file: str | None = None
    method: dict[str, Any] | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    resolved: dict[str, Any] | None = None
    suffix: str | None = None
    metadata: dict[str, str] | None = None
    integrations: list[dict[str, Any]] | None = None
    tunewright: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    trained_tokens: int | None = None
    estimated_finish: int | None = None
    result_files: list[str] = field(default_factory=list)
    attempt: int = 0
    retry: dict[str, Any] | None = None
    started_by: str = "api"

    @property
    def is_chain(self) -> bool:
        return "stages" in self.spec


@dataclass(frozen=True)
class EventRow:
    """One event of a job. type: as in core.events (an OpenAI client is shown `metrics`, else `message`)."""

    id: str
    job_id: str
    created_at: int
    time: float
    attempt: int
    seq: int
    level: str
    type: str
    message: str
    data: dict[str, Any]


@dataclass(frozen=True)
class CheckpointRow:
    """A callable checkpoint. name: the `ft:` name with `:ckpt-step-N`, without it for the finished model."""

    id: str
    created_at: int
    name: str
    step: int
    metrics: dict[str, Any]
    job_id: str


@dataclass(frozen=True)
class ModelRow:
    """A model or checkpoint that a job left, or a recipe (no job_id). folder: its artefact folder (absolute)."""

    name: str
    created_at: int
    folder: str
    base: str
    job_id: str
    step: int


@dataclass(frozen=True)
class KeyRow:
    """An API key. hint: its first and last characters. kind: `key`, or `session` for a signed-in browser."""

    id: str
    name: str
    kind: str
    hint: str
    created_at: int
    last_used: int | None = None
    expires_at: int | None = None
    revoked_at: int | None = None


_in = ", ".join(f"'{s}'" for s in STATUSES)
schema = MetaData()
json_type = JSON(none_as_null=True)

files = Table(
    "files",
    schema,
    Column("n", Integer, primary_key=True),
    Column("id", String, nullable=False, unique=True),
    Column("bytes", Integer, nullable=False),
    Column("created_at", Integer, nullable=False),
    Column("expires_at", Integer),
    Column("filename", String, nullable=False),
    Column("purpose", String, nullable=False),
    Column("status", String, nullable=False),
    Column("status_details", String),
    Column("sha256", String, nullable=False, index=True),
)

jobs = Table(
    "jobs",
    schema,
    Column("n", Integer, primary_key=True),
    Column("id", String, nullable=False, unique=True),
    Column("created_at", Integer, nullable=False),
    Column("finished_at", Integer),
    Column("status", String, nullable=False, index=True),
    Column("intent", String),
    Column("model", String, nullable=False),
    Column("base", String, nullable=False),
    Column("name", String, nullable=False, unique=True),
    Column("training_file", String, nullable=False),
    Column("validation_file", String),
    Column("spec", json_type, nullable=False),
    Column("method", json_type),
    Column("hyperparameters", json_type, nullable=False),
    Column("resolved", json_type),
    Column("seed", Integer, nullable=False),
    Column("suffix", String),
    Column("metadata", json_type),
    Column("integrations", json_type),
    Column("tunewright", json_type),
    Column("error", json_type),
    Column("trained_tokens", Integer),
    Column("estimated_finish", Integer),
    Column("result_files", json_type, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("retry", json_type),
    Column("started_by", String, nullable=False),
    CheckConstraint(f"status IN ({_in})", name="job_status"),
)

events = Table(
    "events",
    schema,
    Column("id", String, primary_key=True),
    Column("job_id", String, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("seq", Integer, nullable=False),
    Column("time", Float, nullable=False),
    Column("type", String, nullable=False),
    Column("level", String, nullable=False),
    Column("message", String, nullable=False),
    Column("data", json_type, nullable=False),
    Column("step", Integer),
    Column("shown", Boolean, nullable=False),
    Column("superseded", Boolean, nullable=False),
    Index("events_line", "job_id", "attempt", "seq", unique=True),
    Index("events_order", "job_id", "time", "attempt", "seq"),
    Index("events_type", "job_id", "type", "step"),
)

tails = Table(
    "tails",
    schema,
    Column("job_id", String, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("offset", Integer, nullable=False),
)

keys = Table(
    "keys",
    schema,
    Column("n", Integer, primary_key=True),
    Column("id", String, nullable=False, unique=True),
    Column("hash", String, nullable=False, unique=True),
    Column("name", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("hint", String, nullable=False),
    Column("created_at", Integer, nullable=False),
    Column("last_used", Integer),
    Column("expires_at", Integer),
    Column("revoked_at", Integer),
)

signin_tokens = Table(
    "signin_tokens",
    schema,
    Column("hash", String, primary_key=True),
    Column("expires_at", Integer, nullable=False),
)
