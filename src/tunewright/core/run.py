"""Run: a job's folder, which is the whole truth about the job. The database only indexes it.

runs/<job id>/
  job.json                 written once, before the job is acknowledged
  plan.json                what was decided by measuring; later attempts obey it
  data/                    the training and validation files, by hash
  start/                   the artefact this job continues from, if it does
  teacher/                 the tuned model that this job learns from, or its reward model, if it does
  attempts/N/events.jsonl  one line an event; worker.json (pid, creation time)
  worker.log               what the workers printed
  checkpoints/step-000030/ artefact/, optimizer state, trainer.json, MANIFEST.json
  result/                  the artefact that the job leaves
  answers/                 what a teacher on another server answered to the training and validation rows
  prepared/                what the tuner chose to train by looking at the data, if it does
  retained/                what a method against forgetting measured before step 1 (EWC's Fisher information)
  samples.jsonl            what the model answered in a job over rewards, and how it was graded
  labels.json              the classes of a classification job, in order
  step_metrics.csv         OpenAI's result file
  lock                     held by the worker
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from tunewright.core.durable import is_locked, read_json, write_json
from tunewright.core.errors import CheckpointError, ModelNotFound
from tunewright.core.events import Event, current, read_events, stream_events, superseded
from tunewright.core.home import Home
from tunewright.core.ids import parse_model_name
from tunewright.core.spec import JobSpec

ARTEFACT = "artefact.json"
BASE_IS_START = "@start"  # the base is the run's own copy of the weights it continued from


class JobFile(BaseModel):
    """job.json. Paths are relative to the run folder.

    name: the `ft:` name the finished model will have. base: the catalogue name or folder of the weights below it.
    train, validation: the copied data files. more: those of other roles (core.spec.extra_files).
    sources: {"train": {"name", "sha256", "bytes"}, "validation": …}.
    teacher: of a job that learns from another model, or that another one judges for: {"base": catalogue name or folder
        of its weights, and "over": what lies over them, or the weights themselves, if it is a tuned model}.
    stages: of a chain: {name: job spec}, in order; its data files are in `more`, as `NAME/train` …
    chain: of a job that is a stage of a chain: {"id": the chain's, "stage": name}.
    """

    model_config = ConfigDict(extra="forbid")
    id: str
    created_at: float
    name: str
    base: str
    spec: JobSpec
    train: str
    validation: str | None = None
    more: dict[str, str] = {}
    sources: dict[str, dict[str, Any]] = {}
    start: str | None = None
    teacher: dict[str, str] = {}
    stages: dict[str, JobSpec] = {}
    chain: dict[str, str] = {}

    def file(self, role: str) -> str:
        """The data file of a role: `train`, `validation` or one of `more`."""
        return {"train": self.train, "validation": self.validation, **self.more}[role] or ""


class Artefact(BaseModel):
    """artefact.json: what a folder of weights is, so that the engine can serve it.

    kind: `adapter` (peft files over `base`), `delta` (values that differ from `base`), `weights` (a whole model),
        `recipe` (no weights of its own).
    base: the catalogue name or folder of the base model, or BASE_IS_START; None when kind is weights. Of a recipe: the
        name of the model below it, which may be an `ft:` name.
    recipe: of a recipe: its name and options.
    decoding: default sampling parameters from the job's task.
    head: what the model answers with: `lm` (tokens), `classify` or `regress`. labels: its classes, in order.
    quantization: how the base was held while this was trained over it (`none`, `nf4`, `int8`). It is served over the
        unquantised base.
    """

    model_config = ConfigDict(extra="forbid")
    format_version: int = 1
    kind: str
    name: str
    base: str | None
    tuner: dict[str, Any]
    step: int
    decoding: dict[str, Any] = {}
    head: str = "lm"
    labels: list[str] | None = None
    quantization: str = "none"
    metrics: dict[str, Any] = {}
    recipe: dict[str, Any] | None = None


@dataclass(frozen=True)
class Run:
    """Paths and readings of one run folder."""

    folder: Path

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def lock(self) -> Path:
        return self.folder / "lock"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def result(self) -> Path:
        return self.folder / "result"

    @property
    def prepared(self) -> Path:
        return self.folder / "prepared"

    @property
    def retained(self) -> Path:
        return self.folder / "retained"

    @property
    def metrics_csv(self) -> Path:
        return self.folder / "step_metrics.csv"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def attempt(self, n: int) -> Path:
        return self.folder / "attempts" / str(n)

    def attempts(self) -> list[int]:
        """Numbers of the attempts so far, ascending."""
        parent = self.folder / "attempts"
        return sorted(int(p.name) for p in parent.iterdir() if p.name.isdigit()) if parent.is_dir() else []

    def job(self) -> JobFile:
        return JobFile.model_validate(read_json(self.folder / "job.json"))

    def write_job(self, job: JobFile) -> None:
        write_json(self.folder / "job.json", job.model_dump(mode="json"))

    def plan(self) -> dict[str, Any] | None:
        path = self.folder / "plan.json"
        return read_json(path) if path.exists() else None

    def write_plan(self, plan: dict[str, Any]) -> None:
        write_json(self.folder / "plan.json", plan)

    def all_events(self) -> list[Event]:
        """Every line of every attempt, also the superseded ones."""
        return [e for n in self.attempts() for e in read_events(self.attempt(n) / "events.jsonl", n)[0]]

    def events(self) -> list[Event]:
        """The events that count: in order, without what a later attempt did again."""
        return current(self.all_events())

    def stream(self) -> Iterator[Event]:
        """The same as events(), read in constant memory."""
        paths = [(n, self.attempt(n) / "events.jsonl") for n in self.attempts()]
        resumed = [e for n, path in paths for e in stream_events(path, n) if e.type == "resumed"]
        for n, path in paths:
            yield from (e for e in stream_events(path, n) if not superseded(e, resumed))

    def end(self) -> Event | None:
        """The `end` event of the newest attempt, or None while it runs or if it was killed."""
        numbers = self.attempts()
        if not numbers:
            return None
        events, _ = read_events(self.attempt(numbers[-1]) / "events.jsonl", numbers[-1])
        return events[-1] if events and events[-1].type == "end" else None

    def is_active(self) -> bool:
        """Whether a worker holds the run's lock."""
        return is_locked(self.lock)


def list_runs(home: Home) -> list[Run]:
    """All runs with a job.json, oldest first."""
    if not home.runs.is_dir():
        return []
    runs = [Run(p) for p in home.runs.iterdir() if (p / "job.json").is_file()]
    return sorted(runs, key=lambda r: (r.folder / "job.json").stat().st_mtime_ns)


def list_recipes(home: Home) -> list[Path]:
    """The folders of all models made without training, oldest first."""
    if not home.recipes.is_dir():
        return []
    folders = [p for p in home.recipes.iterdir() if p.name.isalnum() and (p / ARTEFACT).is_file()]
    return sorted(folders, key=lambda p: (p / ARTEFACT).stat().st_mtime_ns)


def read_artefact(folder: Path) -> Artefact:
    try:
        return Artefact.model_validate(read_json(folder / ARTEFACT))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"'{folder.name}' is not a model of tunewright: its {ARTEFACT} cannot be read.") from e


def base_of(folder: Path, artefact: Artefact) -> str | None:
    """The catalogue name or the folder of an artefact's base model. folder: where the artefact lies."""
    if artefact.base != BASE_IS_START:
        return artefact.base
    run = next((p for p in folder.absolute().parents if (p / "job.json").is_file()), None)
    if run is None:
        raise CheckpointError(f"'{folder.name}' continues from weights that are kept in its run folder, which is gone.")
    return str(run / "start")


def find_artefact(home: Home, name: str) -> Path:
    """The folder of an `ft:` model, checkpoint or recipe. Raises ModelNotFound."""
    wanted = parse_model_name(name)
    if wanted is not None:
        recipe = home.recipes / wanted.id
        if wanted.step is None and (recipe / ARTEFACT).is_file() and read_artefact(recipe).name == name:
            return recipe
        final = str(wanted) if wanted.step is None else str(wanted).rsplit(":ckpt-step-", 1)[0]
        for run in list_runs(home):
            if run.job().name == final:
                folder = run.result if wanted.step is None else run.checkpoint(wanted.step) / "artefact"
                if (folder / ARTEFACT).is_file():
                    return folder
    raise ModelNotFound(
        f"The model '{name}' does not exist here. `tunewright models` lists what there is.", param="model"
    )
