"""Before a job may start: whether its rows are of a kind that its objective can use, and have what its grader names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunewright.core.chain import in_stage
from tunewright.core.errors import UserError
from tunewright.core.home import Home
from tunewright.core.run import Run
from tunewright.core.spec import JobSpec
from tunewright.graders.base import Seams, nobody, parse_grader
from tunewright.jobs.describe import load_describe


def check_data(home: Home, run: Run) -> None:
    """Check the data files of a run; of a chain, those of all its stages. Raises the DataError that OpenAI's job error
    is made of, SpecError for rows that lack what a grader names."""
    job = run.job()
    if not job.stages:
        check_files(home, run, job.spec, {"train": job.train, "validation": job.validation}, job.sources)
    for name, spec in job.stages.items():
        paths = {role: job.more.get(f"{name}/{role}") for role in ("train", "validation")}
        sources = {role: job.sources.get(f"{name}/{role}", {}) for role in paths}
        try:
            check_files(home, run, spec, paths, sources)
        except UserError as e:
            raise in_stage(name, e) from e


def check_files(home: Home, run: Run, spec: JobSpec, paths: dict[str, Any], sources: dict[str, dict[str, Any]]) -> None:
    """Check the training and the validation file of a job in the run folder."""
    from tunewright.data.validate import check_file, raise_for

    described = load_describe(home)
    for what, key, least in (("training", "train", spec.min_examples), ("validation", "validation", 1)):
        if paths[key] is not None:
            place = run.folder / paths[key]
            # the copy in the run folder is called by its hash
            name = sources.get(key, {}).get("name", "") or place.name
            rules = usable_rows(spec, what, described)
            report = check_file(place, format=spec.format, min_examples=least, name=name, **rules)
            raise_for(report, what)
            check_grader(spec, place, report.format, name)


def usable_rows(spec: JobSpec, what: str, described: Mapping[str, Any]) -> dict[str, Any]:
    """Which rows a file of the job may have, as arguments of data.validate.check_file. what: `training` or another."""
    users: dict[str, list[str]] = {}
    for name, row in described["objective"].items():
        for shape in row["card"].get("shapes", ()):
            users.setdefault(shape, []).append(name)
    card = described["objective"][spec.objective.name]["card"]
    shapes = card.get("shapes")
    if shapes is not None and what != "training":
        shapes = (*shapes, *card.get("beside", ()))
    return {
        "purpose_shapes": shapes,
        "method": card.get("openai_method") or spec.objective.name,
        "objectives": users,
    }


def check_grader(spec: JobSpec, path: Path, format: str, name: str) -> None:
    """Raise SpecError (invalid_variable_error) for a field that the job's grader names and no row of the file has."""
    from tunewright.data.validate import read_conversations

    grader = spec.objective.options.get("grader")
    if grader is None:
        return
    with parse_grader(grader, None, "objective.grader", Seams(ask=nobody)) as checked:
        wanted = checked.fields
    have: set[str] = set()
    for row in read_conversations(path, format, name) if wanted else ():
        have |= (row.item or {}).keys()
        if wanted <= have:
            return
    if wanted:
        parse_grader(grader, have, "objective.grader", Seams(ask=nobody))
