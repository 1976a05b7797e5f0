"""What a logger is, and the one loop that feeds it: the points that count, each once, however often it is called."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from tunewright.core.errors import UserError
from tunewright.core.run import Run
from tunewright.jobs.loggers import LOGGERS

NOT_A_CURVE = ("step", "total_steps", "eta_s")
SECONDS = 2.0  # between two looks at a running job


@dataclass(frozen=True)
class Point:
    """The numbers of one training step, by the names they have in the run's events. time: Unix seconds."""

    step: int
    time: float
    values: dict[str, float]

    @property
    def mark(self) -> tuple[int, float]:
        """Differs when a step was done again (a resumed or rolled-back job): the speed is never twice the same."""
        return self.step, self.values.get("tokens_per_second", self.time)


class Logger(Protocol):
    """needs: the package it is for. folder: where it keeps what it writes on this machine."""

    needs: ClassVar[str]

    def __init__(self, run: Run, folder: Path) -> None: ...

    def begin(self, points: Sequence[Point]) -> int:
        """Open the job's record in the tool. Returns how many of `points`, from the first, it holds already; what it
        holds beside them is thrown away."""
        ...

    def write(self, points: Sequence[Point]) -> None: ...

    def close(self, status: str | None) -> None:
        """status: the job's, None while it has none. The record stays and can be opened again."""
        ...

    def where(self) -> str:
        """One line that says where the curves are and how to look at them."""
        ...


def open_logger(name: str, run: Run, folder: Path) -> Logger:
    """The logger `name` for a run. Raises SpecError for an unknown name, UserError if its package is missing."""
    kind = LOGGERS.load(name)
    if importlib.util.find_spec(kind.needs) is None:
        package = {"mlflow": "mlflow-skinny"}.get(kind.needs, kind.needs)
        raise UserError(
            f"`--to {name}` needs the package {package}, which is not installed. "
            f"Install it with: pip install {package}",
            code="package_missing",
            param="to",
        )
    folder.mkdir(parents=True, exist_ok=True)
    return kind(run, folder)


def points(run: Run) -> list[Point]:
    """The steps that count, in order, without what a later attempt did again."""
    return [
        Point(
            e.data["step"],
            e.time,
            {k: float(v) for k, v in e.data.items() if k not in NOT_A_CURVE and type(v) in (int, float)},
        )
        for e in run.events()
        if e.type == "metrics"
    ]


def parameters(run: Run) -> dict[str, Any]:
    """The job's settings and what was decided by measuring, flat: `spec.tuner.r`, `plan.batch_size` …"""
    plan = {k: v for k, v in (run.plan() or {}).items() if not isinstance(v, dict | list)}
    job = run.job()
    return _flat({"model": job.name, "base": job.base, "spec": job.spec.model_dump(mode="json"), "plan": plan})


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return found


def feed(run: Run, logger: Logger, *, follow: bool, wait: Callable[[float], None] = time.sleep) -> int:
    """Copy the run's points to the logger, with `follow` until no worker is left; returns how many points there are."""
    written: list[tuple[int, float]] | None = None
    try:
        while True:
            active = run.is_active() or not run.attempts()
            now = points(run)
            marks = [p.mark for p in now]
            known = written is not None and written == marks[: len(written)]
            logger.write(now[len(written or ()) if known else logger.begin(now) :])
            written = marks
            if not (follow and active):
                return len(marks)
            wait(SECONDS)
    finally:
        end = run.end()
        logger.close(None if end is None else str(end.data.get("status")))
