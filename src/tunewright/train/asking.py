"""Before a job's rows are rendered: a teacher on another server answers them, once. `answers/` keeps what it said.

The file is a training file of chat rows like any other: it can be looked at, kept, and trained on again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from tunewright.core.asking import Teacher
from tunewright.core.durable import commit_folder
from tunewright.core.errors import DataReport, SpecError
from tunewright.core.events import EventWriter
from tunewright.core.home import Home
from tunewright.core.outbound import find_endpoint
from tunewright.core.run import JobFile, Run
from tunewright.core.spec import JobSpec
from tunewright.data.asking import Asked, answered_rows
from tunewright.data.validate import check_file, raise_for, read_conversations
from tunewright.train.finish import Start
from tunewright.train.prepare import is_kept

ROWS = "rows.jsonl"
TOLD_EVERY = 20  # rows
Row = TypeVar("Row")


def answers_of(run: Run, role: str) -> Path:
    """Where the answered rows of a role are, once they are."""
    return run.folder / "answers" / role / ROWS


@dataclass(frozen=True)
class Asking:
    """What is needed to make a job's rows. start: what the job starts from. judge: a model of this machine that judges,
    if one does."""

    run: Run
    job: JobFile
    spec: JobSpec
    objective: Any
    home: Home
    events: EventWriter
    stop: Callable[[], bool]
    start: Start
    judge: Start | None = None


def ask_teacher(a: Asking) -> None:
    """Have the training and the validation file answered, if an earlier attempt has not.

    Raises DataError, SpecError (too few answers that can be learned), UserError, EndpointDown, Interrupted.
    """
    o = a.objective.options
    endpoint = find_endpoint(o.endpoint)
    given = {"max_tokens": o.max_tokens, **({} if o.temperature is None else {"temperature": o.temperature})}
    teacher = Teacher(endpoint, o.model, a.home.cache / "answers", o.system, given)
    for role in ("train", *(["validation"] if a.job.validation else [])):
        folder = answers_of(a.run, role).parent
        if is_kept(folder, "teacher's answers", a.events):
            continue
        asked = Asked()
        path, name, report = checked(a.run, a.job, a.spec, a.objective, role)
        rows = told(read_conversations(path, report.format, name), report.n_rows, asked, o.model, a.events)
        found = answered_rows(rows, teacher, asked, budget=o.budget, concurrency=o.concurrency, stop=a.stop)
        commit_folder(folder, lambda tmp, found=found: write_rows(tmp / ROWS, found), {"teacher": o.model})
        a.events.write("message", summary(asked, name, o.model), {"answers": asdict(asked)})
        least = a.spec.min_examples if role == "train" else 1
        if asked.answered < least:
            raise SpecError(
                f"{o.model} gave {asked.answered} answers to {name} that can be learned, and the job needs {least}"
                f"{': ' + asked.reason if asked.reason else ''}. Raise the budget, or look at the teacher.",
                param="objective",
                code="invalid_n_examples",
            )


def checked(run: Run, job: JobFile, spec: JobSpec, objective: Any, role: str) -> tuple[Path, str, DataReport]:
    """A role's data file, what it is called, and what it holds. Raises DataError."""
    path, name = run.folder / job.file(role), job.sources.get(role, {}).get("name", job.file(role))
    report = check_file(path, format=spec.format, purpose_shapes=objective.card.shapes, min_examples=1, name=name)
    raise_for(report, what="training" if role == "train" else role)
    return path, name, report


def summary(asked: Asked, name: str, model: str) -> str:
    """What became of a file's rows, in words."""
    kept = f" ({asked.kept} of them kept from before)" if asked.kept else ""
    text = f"{model} answered {asked.answered} of {asked.rows} rows of {name}{kept}, {asked.tokens:,} tokens"
    if asked.unusable:
        text += f"; {asked.unusable} answers were left out, the first because {asked.reason}"
    return text + (f"; {asked.left_out} rows were not asked for: the budget is spent" if asked.left_out else "")


def told(rows: Iterator[Row], total: int, asked: Asked, model: str, events: EventWriter) -> Iterator[Row]:
    """Pass rows on, with a `phase` event now and then."""
    for i, row in enumerate(rows):
        if i % TOLD_EVERY == 0:
            text = f"Asking {model}: {i} of {total} rows, {asked.tokens:,} tokens"
            events.write("phase", text, {"name": "asking", "done": i, "total": total})
        yield row


def write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
