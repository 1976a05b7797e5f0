"""A chain's run folder, the folders of its stages, and what comes next: a pure function of what there is.

Nothing records how far a chain is. A stage's job has an id that follows from the chain's, the stage's name and the
number of the try, so the server and `tunewright train` find the same jobs, also after a crash between two writes.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunewright.core.chain import PREFIX, Stages, fill_in, in_stage
from tunewright.core.durable import disk_full_is_clear, fsync_path
from tunewright.core.errors import UserError
from tunewright.core.home import Home
from tunewright.core.ids import new_id
from tunewright.core.run import JobFile, Run
from tunewright.core.spec import JobSpec
from tunewright.jobs.models import stable_id
from tunewright.jobs.prepare import Origin, create_run, fill, find_names, find_origin, make_way
from tunewright.jobs.rows import JobRow

STAGE_PARTS = ("train", "validation")


@dataclass(frozen=True)
class Child:
    """The newest job of a stage. status: as in rows.STATUSES. model: the `ft:` name that its result has."""

    id: str
    status: str
    model: str
    error: dict[str, Any] | None = None


@dataclass(frozen=True)
class Next:
    """What follows for a chain. `start`: a job of `spec` for the stage. `wait`: its job `child` is not at its end.
    `failed`: `child` failed or was cancelled. `done`: the last stage's `child` has succeeded. number: of the stage,
    from 1."""

    what: Literal["start", "wait", "failed", "done"]
    stage: str
    number: int
    spec: JobSpec | None = None
    child: Child | None = None


def next_stage(stages: Mapping[str, JobSpec], made: Mapping[str, Child]) -> Next:
    """What follows. stages: {name: spec with `stage:NAME` in it}, in order. made: the newest job of each stage."""
    models: dict[str, str] = {}
    last = Next("done", "", 0)
    for number, (name, spec) in enumerate(stages.items(), 1):
        child = made.get(name)
        if child is None:
            return Next("start", name, number, spec=fill_in(spec, models))
        if child.status != "succeeded":
            what = "failed" if child.status in ("failed", "cancelled") else "wait"
            return Next(what, name, number, spec=fill_in(spec, models), child=child)
        models[name] = child.model
        last = Next("done", name, number, child=child)
    return last


def child_id(chain_id: str, stage: str, attempt: int) -> str:
    """The id of a stage's job. attempt: from 1; a stage that failed is done again as a new job."""
    return stable_id("ftjob-", chain_id, stage, attempt)


def attempts_of(chain_id: str, stage: str, known: Callable[[str], bool]) -> int:
    """How many jobs the stage has had. known: whether there is a job of an id."""
    n = 0
    while known(child_id(chain_id, stage, n + 1)):
        n += 1
    return n


def create_chain(
    home: Home,
    stages: Stages,
    *,
    job_id: str | None = None,
    paths: Mapping[str, Path],
    names: dict[str, str] | None = None,
) -> Run:
    """Make the run folder of a chain, with the data files of all its stages; like create_run otherwise.

    paths, names: by `STAGE/role`. Raises as create_run does.
    """
    origin, job_id = check_names(home, stages), job_id or new_id("ftjob-")
    seed = secrets.randbelow(1 << 31)
    seeded = {k: s.model_copy(update={"seed": seed if s.seed is None else s.seed}) for k, s in stages.items()}
    run = Run(home.runs / job_id)
    make_way(run)
    with disk_full_is_clear(f"the run folder of {job_id}"):
        try:
            # what the first stage continues from is copied into its own folder
            sources, places = fill(home, run, Origin(origin.short, origin.base), dict(paths), names or {})
            fsync_path(home.runs)
            run.write_job(
                JobFile(
                    id=job_id,
                    created_at=time.time(),
                    name=job_id,  # a chain has no model of its own: its last stage's job has
                    base=origin.base,
                    spec=next(iter(seeded.values())),
                    train=places[f"{next(iter(stages))}/train"],
                    more=places,
                    sources=sources,
                    stages=seeded,
                )
            )
        except BaseException:
            shutil.rmtree(run.folder, ignore_errors=True)
            raise
    return run


def check_names(home: Home, stages: Stages) -> Origin:
    """Look for every model and endpoint that a stage names, but other stages; returns what the first one starts from.

    Raises ModelNotFound, SpecError.
    """
    first = next(iter(stages.values())).model
    for name, spec in stages.items():
        try:
            known = spec.model_copy(update={"model": first}) if spec.model.startswith(PREFIX) else spec
            find_names(home, known)
        except UserError as e:
            raise in_stage(name, e) from e
    return find_origin(first, home)


def create_stage(home: Home, chain: Run, todo: Next, attempt: int) -> Run:
    """The run folder of a stage's job; the one that is there already, if it is. todo: what next_stage said."""
    run = Run(home.runs / child_id(chain.id, todo.stage, attempt))
    if (run.folder / "job.json").is_file():
        return run
    assert todo.spec is not None
    job = chain.job()
    begin = f"{todo.stage}/"
    roles = {key.removeprefix(begin): key for key in job.more if key.startswith(begin)}
    paths = {role: chain.folder / job.more[key] for role, key in roles.items()}
    return create_run(
        home,
        todo.spec,
        job_id=run.id,
        train_path=paths["train"],
        validation_path=paths.get("validation"),
        more={role: path for role, path in paths.items() if role not in STAGE_PARTS},
        names={role: job.sources[key]["name"] for role, key in roles.items()},
        chain={"id": chain.id, "stage": todo.stage},
    )


def stage_list(stages: Mapping[str, JobSpec], made: Mapping[str, JobRow]) -> list[dict[str, Any]]:
    """The stages as the chain's row shows them. status: `waiting` before there is a job."""
    return [
        {
            "name": name,
            "objective": spec.objective.name,
            "model": spec.model,
            "training_file": spec.training_file,
            "id": made[name].id if name in made else None,
            "status": made[name].status if name in made else "waiting",
            "fine_tuned_model": made[name].name if name in made and made[name].status == "succeeded" else None,
        }
        for name, spec in stages.items()
    ]
