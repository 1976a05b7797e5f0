"""The head of a job and its classes: those the job names, those of the classifier that it continues, or those of the
training file.

labels.json in the run folder holds the classes in order and how often the training rows have them, so that every
attempt and the validation file use the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from tunewright.core.conversation import Conversation
from tunewright.core.durable import read_json, write_json
from tunewright.core.errors import DataError, SpecError
from tunewright.core.run import JobFile, Run, read_artefact
from tunewright.core.spec import JobSpec
from tunewright.data.sides import class_names
from tunewright.data.validate import read_conversations
from tunewright.models.heads import CLASSES, Head

MAX_CLASSES = 1000
NAMES = {"regress": ("value",), "reward": ("reward",)}  # of the one output of heads without classes


def job_head(run: Run, spec: JobSpec, objective: Any) -> Head | None:
    """The head that the spec asks for, once the training file has been read; None for the LM head.

    Tells an objective over classes which there are, and how many training rows have each. Raises SpecError if its
    options name others.
    """
    if spec.head == "lm":
        return None
    if spec.head not in CLASSES:
        return Head(spec.head, NAMES[spec.head], spec.seed or 0)
    known = read_json(_file(run))
    begin = getattr(objective, "begin", None)
    if begin is not None:
        begin(tuple(known["labels"]), tuple(known["counts"]), known["rows"])
    return Head(spec.head, tuple(known["labels"]), spec.seed or 0)


def job_labels(run: Run, job: JobFile, spec: JobSpec, path: Path, format: str, name: str) -> tuple[str, ...] | None:
    """The classes in order, settled at the first call from the training file at `path` and those mixed with it; None
    if there are none.

    Raises DataError if the file has one class only, or so many that the labels must be values; SpecError if the job
    names other classes than the classifier that it continues.
    """
    if spec.head not in CLASSES:
        return None
    if not _file(run).exists():
        mixed = [run.folder / file for role, file in job.more.items() if role.startswith("mix-")]
        rows = chain(read_conversations(path, format, name), *(read_conversations(p, spec.format) for p in mixed))
        counts, n = _count(rows)
        labels = _named(run, job, spec) or class_names(set(counts))
        _check(labels, name)
        found = {"labels": list(labels), "counts": [counts[label] for label in labels], "rows": n}
        write_json(_file(run), found)
    return tuple(read_json(_file(run))["labels"])


def _count(rows: Iterable[Conversation]) -> tuple[Counter[str], int]:
    """How many rows have each label, and how many rows there are."""
    counts: Counter[str] = Counter()
    n = 0
    for n, row in enumerate(rows, 1):  # noqa: B007
        counts.update(row.label if isinstance(row.label, list) else [str(row.label)])
    return counts, n


def _named(run: Run, job: JobFile, spec: JobSpec) -> tuple[str, ...] | None:
    """The classes that are settled before a row is read."""
    asked = tuple(spec.objective.options.get("labels") or ())
    start = read_artefact(run.folder / job.start) if job.start else None
    known = tuple(start.labels or ()) if start and start.head == spec.head else ()
    if asked and known and asked != known:
        raise SpecError(
            f"The model to continue from tells the classes {', '.join(known)} apart, in this order, and the job names "
            f"{', '.join(asked)}. Leave the objective's option 'labels' out.",
            param="objective",
        )
    return known or asked or None


def _file(run: Run) -> Path:
    return run.folder / "labels.json"


def _check(labels: Sequence[str], name: str) -> None:
    if len(labels) < 2:
        only = next(iter(labels), "")
        raise DataError(
            f"Every row of {name} has the label '{only}': there is nothing to tell apart. Add rows of another class.",
            param="training_file",
        )
    if len(labels) > MAX_CLASSES:
        shown = ", ".join(labels[:5])
        raise DataError(
            f"{name} has {len(labels)} different labels ({shown} …); a classifier has at most {MAX_CLASSES}. If they "
            "are values, use head: regress; else check that the column holds classes.",
            param="training_file",
        )
