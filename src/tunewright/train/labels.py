"""The head of a job and its classes, which the training file names, or the classifier that the job continues.

labels.json in the run folder holds the classes in order, so that every attempt and the validation file use the same.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from tunewright.core.durable import read_json, write_json
from tunewright.core.errors import DataError
from tunewright.core.run import JobFile, Run, read_artefact
from tunewright.core.spec import JobSpec
from tunewright.data.sides import class_names
from tunewright.data.validate import read_conversations
from tunewright.models.heads import Head

MAX_CLASSES = 1000


def job_head(run: Run, spec: JobSpec) -> Head | None:
    """The head that the spec asks for, once the training file has been read; None for the LM head."""
    if spec.head == "lm":
        return None
    labels = ("value",) if spec.head == "regress" else tuple(read_json(_file(run))["labels"])
    return Head(spec.head, labels, spec.seed or 0)


def job_labels(run: Run, job: JobFile, spec: JobSpec, path: Path, format: str, name: str) -> tuple[str, ...] | None:
    """The classes in order, settled at the first call from the training file at `path` and those mixed with it; None
    if there are none.

    Raises DataError if the file has one class only, or so many that the labels must be values.
    """
    if spec.head != "classify":
        return None
    if not _file(run).exists():
        start = read_artefact(run.folder / job.start) if job.start else None
        known = start.labels if start else None
        mixed = [run.folder / file for role, file in job.more.items() if role.startswith("mix-")]
        rows = chain(read_conversations(path, format, name), *(read_conversations(p, spec.format) for p in mixed))
        labels = known or class_names({str(row.label) for row in rows})
        _check(labels, name)
        write_json(_file(run), {"labels": list(labels)})
    return tuple(read_json(_file(run))["labels"])


def _file(run: Run) -> Path:
    return run.folder / "labels.json"


def _check(labels: tuple[str, ...] | list[str], name: str) -> None:
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
