"""A job's run folder, made whole before anyone hears of the job: data by hash, what it continues from, job.json."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.core.chain import HEAD_OF, PREFIX
from tunewright.core.durable import discard, disk_full_is_clear, fsync_path, sha256_file
from tunewright.core.errors import NotFound, SpecError, StateError
from tunewright.core.home import Home
from tunewright.core.ids import ModelName, new_id, parse_model_name, random_part
from tunewright.core.outbound import find_endpoint, named_endpoints
from tunewright.core.run import JobFile, Run, base_of, find_artefact, read_artefact
from tunewright.core.spec import HEADS, JobSpec, Part, extra_files
from tunewright.graders.base import Seams, nobody, parse_grader
from tunewright.graders.judging import models_here
from tunewright.models.catalogue import resolve

_UNFINISHED_SECONDS = 24 * 3600
OTHER_MODELS = ("teacher", "judge", "reward_model")  # options that name one
_PARAMS = {"train": "training_file", "validation": "validation_file"}


@dataclass(frozen=True)
class Origin:
    """What a job starts from. short: the base in the model's name. base: its catalogue name or folder.

    artefact: the folder to continue from. private_base: a base folder that belongs to another run.
    """

    short: str
    base: str
    artefact: Path | None = None
    private_base: Path | None = None


def create_run(
    home: Home,
    spec: JobSpec,
    *,
    job_id: str | None = None,
    org: str = "personal",
    train_path: Path,
    validation_path: Path | None = None,
    more: Mapping[str, Path] | None = None,
    names: dict[str, str] | None = None,
    chain: Mapping[str, str] | None = None,
) -> Run:
    """Make the run folder of a job and return it; when this returns, the job survives a power cut.

    The seed is drawn if the spec has none. Data files are linked from the data folder or copied from elsewhere, and an
    artefact to continue from comes along, so that nothing of the job depends on files that others may delete.
    more: the data files of other roles (core.spec.extra_files).
    names: {"train": …, "validation": …}, what the files are called, if not as their paths say.
    chain: of which chain the job is a stage, as JobFile has it.
    Raises ModelNotFound, NotFound for a missing data file, SpecError for one that was not given, DiskFull, StateError
    if the job has begun already.
    """
    missing = sorted(extra_files(spec).keys() - (more or {}).keys())
    if missing:
        raise SpecError(f"The job's files {', '.join(missing)} were not given.", param=missing[0].partition("-")[0])
    job_id = job_id or new_id("ftjob-")
    seed = secrets.randbelow(1 << 31) if spec.seed is None else spec.seed
    spec = spec.model_copy(update={"seed": seed})
    origin, teacher = find_names(home, spec)
    run = Run(home.runs / job_id)
    make_way(run)
    with disk_full_is_clear(f"the run folder of {job_id}"):
        try:
            paths = {"train": train_path, "validation": validation_path, **(more or {})}
            sources, places = fill(home, run, origin, {k: p for k, p in paths.items() if p is not None}, names or {})
            taught = {} if teacher is None else _take_teacher(run, teacher)
            fsync_path(home.runs)
            run.write_job(
                JobFile(
                    id=job_id,
                    created_at=time.time(),
                    name=str(ModelName(origin.short, org, spec.suffix or "", random_part(8))),
                    base=origin.base if origin.private_base is None else str(run.folder / "base"),
                    spec=spec,
                    train=places.pop("train"),
                    validation=places.pop("validation", None),
                    more=places,
                    sources=sources,
                    start=None if origin.artefact is None else "start",
                    teacher=taught,
                    chain=dict(chain or {}),
                )
            )
        except BaseException:
            shutil.rmtree(run.folder, ignore_errors=True)
            raise
    return run


def find_names(home: Home, spec: JobSpec) -> tuple[Origin, Origin | None]:
    """What the job starts from, and the other model of this machine that it needs, if it does.

    Raises ModelNotFound, SpecError (as other_model has it).
    """
    origin, named = find_origin(spec.model, home), other_model(spec.objective)
    if named is None:
        return origin, None
    other = find_origin(named[1], home)
    check_head(*named, "lm" if other.artefact is None else read_artefact(other.artefact).head)
    return origin, other


def other_model(objective: Part) -> tuple[str, str] | None:
    """(option, name) of the model of this machine that a job asks beside its own: a teacher, a judge, a reward model,
    or the judge of a grader. None also for another stage of a chain, as long as it has no result.

    Raises SpecError for an endpoint that may not be called, a grader that is none, and more than one such model.
    """
    options = objective.options
    for url in named_endpoints(options):
        find_endpoint(url)
    if options.get("endpoint") and not options.get("model"):
        text = f"The objective '{objective.name}' names an endpoint; give its option 'model', too."
        raise SpecError(text, param="objective")
    if options.get("grader") is not None and options.get("reward_model"):
        raise SpecError("Rewards come from a grader or from a reward model; give one of them.", param="objective")
    found = [(key, options[key]) for key in OTHER_MODELS if isinstance(options.get(key), str) and options[key]]
    if options.get("grader") is not None:
        with parse_grader(options["grader"], None, "objective.grader", Seams(ask=nobody)) as grader:
            found += [("grader", name) for name in dict.fromkeys(models_here(grader.spec))]
    if len(found) > 1:
        names = ", ".join(f"{option} '{name}'" for option, name in found)
        raise SpecError(
            f"A job asks one model of this machine beside its own, and this one names {len(found)}: {names}. Use one "
            "of them for all, or give a judge an endpoint.",
            param="objective",
        )
    return found[0] if found and not found[0][1].startswith(PREFIX) else None


def check_head(option: str, name: str, head: str) -> None:
    """Raise SpecError unless the model that other_model() found, whose head is given, is of the kind that is asked."""
    wanted = HEAD_OF.get(option, "lm")
    if head == wanted:
        return
    has = "it writes text" if head == "lm" else f"it has a head for whole rows ({head})"
    if wanted == "lm":
        what = "judge" if option == "grader" else option
        text = f"The {what} '{name}' writes no text: {has}. Name a model that does."
    else:
        first = f"Train one first, with objective: {HEADS[wanted]}, and name its ft: model."
        text = f"'{name}' is no {wanted} model: {has}. {first}"
    raise SpecError(text, param="objective")


def fill(
    home: Home, run: Run, origin: Origin, paths: dict[str, Path], names: dict[str, str]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Everything but job.json, which makes the folder a job; returns what job.json says of the data: where each file
    came from and where it is now, by role."""
    (run.folder / "data").mkdir(mode=0o700, parents=True)
    sources, places = {}, {}
    for role, path in paths.items():
        places[role], sources[role] = _take_data(
            home, run, path, names.get(role), _PARAMS.get(role.rpartition("/")[2], role.partition("-")[0])
        )
    if origin.artefact is not None:
        copy_tree(origin.artefact, run.folder / "start")
    if origin.private_base is not None:
        copy_tree(origin.private_base, run.folder / "base")
    return sources, places


def _take_teacher(run: Run, origin: Origin) -> dict[str, str]:
    """Bring the model that the job learns from into the run, as far as others may delete it; JobFile.teacher."""
    base = origin.base
    if origin.private_base is not None:
        base = str(run.folder / "teacher-base")
        copy_tree(origin.private_base, Path(base))
    if origin.artefact is None:
        return {"base": base}
    copy_tree(origin.artefact, run.folder / "teacher")
    return {"base": base, "over": "teacher"}


def find_origin(model: str, home: Home) -> Origin:
    """What a job on `model` (a base model's name or path, or an `ft:` name) starts from. Raises ModelNotFound."""
    tuned = parse_model_name(model)
    if tuned is not None:
        return _tuned_origin(tuned, home)
    info = resolve(model, home)
    base = info.location if info.kind in ("folder", "gguf") else info.name
    return Origin(_short(Path(base).stem if info.kind == "gguf" else Path(base).name, info.name), base)


def _tuned_origin(tuned: ModelName, home: Home) -> Origin:
    """Continuing keeps the original base, in the name and below the adapter."""
    folder = find_artefact(home, str(tuned))
    if folder.parent == home.recipes:
        raise SpecError(
            f"'{tuned}' is a recipe: it has no weights that could be trained. Train the model below it, "
            f"'{read_artefact(folder).base}'.",
            param="model",
        )
    parent = Run(next(p for p in folder.parents if (p / "job.json").is_file()))
    base = base_of(folder, read_artefact(folder)) or parent.job().base
    private = Path(base) if Path(base).is_dir() and home.runs in Path(base).parents else None
    return Origin(tuned.base, base, folder, private)


def _short(last: str, name: str) -> str:
    """A base's name as a part of an `ft:` name: a hub id keeps its organisation, a path only its last part."""
    text = name.replace("/", "--") if name.count("/") == 1 and not name.startswith(("/", ".", "~")) else last
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-") or "model"


def make_way(run: Run) -> None:
    """Remove a folder of the same id whose job was never acknowledged; never one that has begun."""
    if not run.folder.exists():
        return
    if run.attempts() or run.is_active():
        raise StateError(f"The job {run.id} exists already.")
    discard(run.folder)


def _take_data(home: Home, run: Run, path: Path, name: str | None, param: str) -> tuple[str, dict[str, Any]]:
    """Bring a data file into the run; its path there and where it came from."""
    if not path.is_file():
        raise NotFound(f"There is no file '{name or path}'.", param=param)
    name = name or path.name
    draft = run.folder / "data" / f"draft-{random_part(8)}"
    never_changes = {home.files, home.runs} & set(path.absolute().parents)
    link_or_copy(path, draft, link=bool(never_changes))
    digest = sha256_file(draft)
    suffix = Path(name).suffix.lower()
    target = f"data/{digest}{suffix if re.fullmatch(r'[.][a-z0-9]{1,8}', suffix) else ''}"
    os.rename(draft, run.folder / target)
    fsync_path(run.folder / target)
    fsync_path(run.folder / "data")
    return target, {"name": name, "sha256": digest, "bytes": (run.folder / target).stat().st_size}


def link_or_copy(source: Path, target: Path, link: bool = True) -> None:
    """A hard link where the files never change, and where the file system can; else a copy."""
    if link:
        try:
            os.link(source, target)
            return
        except OSError:
            target.unlink(missing_ok=True)  # other file system, or one without links
    shutil.copyfile(source, target)


def copy_tree(source: Path, target: Path) -> None:
    """A folder of files that never change, linked or copied and synced."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_file():
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            link_or_copy(path, place)
            fsync_path(place)
    for folder in [target, *(p for p in target.rglob("*") if p.is_dir())]:
        fsync_path(folder)


def sweep_unfinished(home: Home) -> None:
    """Remove folders of jobs whose making, or whose removal, was cut off more than a day ago."""
    for path in home.runs.iterdir():
        finished = (path / "job.json").exists() and not path.name.startswith(".trash-")
        if not finished and path.stat().st_mtime < time.time() - _UNFINISHED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
