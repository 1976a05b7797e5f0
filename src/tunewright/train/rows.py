"""From a data file to groups on disk: checked, rendered to token ids, committed once to the run folder.

Nothing here grows with the file. A later attempt finds the folder and reads from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tunewright.core.conversation import Conversation
from tunewright.core.durable import check_folder, commit_folder
from tunewright.core.errors import CheckpointError, DataError
from tunewright.core.events import EventWriter
from tunewright.core.run import JobFile, Run
from tunewright.core.spec import HEADS, JobSpec
from tunewright.data.blocks import Documents
from tunewright.data.render import RenderReport, render_rows
from tunewright.data.rendered import JoinedGroups, StoredGroups, write_groups
from tunewright.data.tokenizer import Tokenizer
from tunewright.data.validate import check_file, raise_for, read_conversations
from tunewright.objectives import OBJECTIVES
from tunewright.train.asking import answers_of
from tunewright.train.labels import job_labels

# what the files of a role are called; a role's name ends with its place in the field, as in core.spec.extra_files
WORDS = {"train": "training", "validation": "validation", "retain": "retained", "mix": "mixed"}
BLOCK = 1024  # tokens of a block of plain texts where max_length is auto


def load_groups(
    run: Run,
    job: JobFile,
    spec: JobSpec,
    tokenizer: Tokenizer,
    objective: Any,
    limit: int,
    role: str,
    events: EventWriter,
) -> StoredGroups:
    """The rows of a data file as token ids, checked and rendered into rendered/ once. Raises DataError.

    Retained rows may be in another format than the job's; they are learned by the plain objective of the model's head,
    which for a language model reads texts too.
    """
    folder = run.folder / "rendered" / role
    wanted = {"options": render_options(job, spec, limit), "tunewright": version("tunewright")}
    try:
        done = check_folder(folder)
    except CheckpointError:
        done = {}
    if any(done.get(k) != v for k, v in wanted.items()):
        render(run, job, spec, tokenizer, objective, limit, role, events, wanted)
        done = check_folder(folder)
    for note in done["notes"]:
        events.write("message", note, {}, "warn")
    return StoredGroups(folder)


def training_groups(job: JobFile, load: Callable[[str], StoredGroups]) -> StoredGroups | JoinedGroups:
    """The rows to train on: of the training file and, with `mix`, of the further ones behind it. load: of a role."""
    first = load("train")
    more = [load(role) for role in job.more if role.startswith("mix-")]
    return JoinedGroups([first, *more]) if more else first


def render_options(job: JobFile, spec: JobSpec, limit: int) -> dict[str, Any]:
    """What decides how rows are rendered, besides the files in the run folder, which never change."""
    return {
        "base": job.base,
        "train_on": spec.train_on,
        "head": spec.head,
        "format": spec.format,
        "objective": spec.objective.model_dump(),
        "overlong": spec.overlong,
        "limit": limit,
    }


def render(
    run: Run,
    job: JobFile,
    spec: JobSpec,
    tokenizer: Tokenizer,
    objective: Any,
    limit: int,
    role: str,
    events: EventWriter,
    info: dict[str, Any],
) -> None:
    """Check a data file, then commit rendered/<role>, in memory that does not grow with the file. Raises DataError."""
    answered, kind = answers_of(run, role), role.partition("-")[0]
    path = answered if answered.is_file() else run.folder / job.file(role)
    what = WORDS[kind]
    name = job.sources.get(role, {}).get("name", path.name)
    minimum = spec.min_examples if role == "train" else 1
    shapes = shapes_of(kind, spec, objective)
    format = "auto" if kind == "retain" or path == answered else spec.format
    report = check_file(
        path,
        format=format,
        purpose_shapes=shapes,
        method="" if kind == "retain" else objective.card.openai_method or spec.objective.name,
        objectives=users_of_shapes(),
        min_examples=minimum,
        name=name,
    )
    raise_for(report, what=what)
    events.write("message", f"The {what} file {name} has {report.n_rows} rows. {report.reason}")
    rendered, notes = RenderReport(), []
    documents: Documents | None = None
    if report.shape == "text" and kind != "retain":
        documents = getattr(objective.options, "documents", "separate")
        limit = min(limit, BLOCK) if spec.max_length == "auto" else limit
    groups = render_rows(
        with_progress(read_conversations(path, report.format, name), report.n_rows, what, events),
        tokenizer,
        report=rendered,
        shape=report.shape,
        train_on=spec.train_on,
        max_length=limit,
        overlong=spec.overlong,
        labels=job_labels(run, job, spec, path, report.format, name),
        head=spec.head,
        documents=documents,
    )

    def fill(folder: Path) -> None:
        try:
            write_groups(folder, groups)
        except DataError as e:
            code = f"invalid_{what}_file" if e.code == DataError.code else e.code
            raise DataError(f"{name}: {e.message}", problems=e.problems, code=code, param=f"{what}_file") from e
        notes.extend(f"{what.capitalize()} file: {note}" for note in rendered.notes)

    commit_folder(run.folder / "rendered" / role, fill, {**info, "notes": notes})


def users_of_shapes() -> dict[str, list[str]]:
    """shape -> the names of the objectives that use rows of it."""
    found: dict[str, list[str]] = {}
    for name in OBJECTIVES:
        for shape in OBJECTIVES.load(name).card.shapes:
            found.setdefault(shape, []).append(name)
    return found


def shapes_of(kind: str, spec: JobSpec, objective: Any) -> tuple[str, ...]:
    """The shapes that the rows of a role may have: the objective's own for the training file; retained rows are learned
    by the plain objective of the job's head."""
    card = OBJECTIVES.load(HEADS[spec.head]).card if kind == "retain" else objective.card
    return card.shapes if kind == "train" else (*card.shapes, *card.beside)


def with_progress(rows: Iterator[Conversation], total: int, what: str, events: EventWriter) -> Iterator[Conversation]:
    """Pass rows on, with a `phase` event for each twentieth of them."""
    every = max(1, total // 20)
    for i, item in enumerate(rows):
        if i % every == 0:
            events.write(
                "phase", f"Rendering the {what} file", {"name": f"rendering {what}", "done": i, "total": total}
            )
        yield item
