"""`tunewright train job.yaml`: one job in the foreground, by the same worker as under the server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from tunewright.core.home import Home
    from tunewright.core.run import Run
    from tunewright.core.spec import JobSpec

FILES = ("training_file", "validation_file")
# what a file of a role is called
WHAT = {"train": "training", "validation": "validation", "retain": "retained", "mix": "mixed"}


def train(
    job: Annotated[Path | None, typer.Argument(help="A job spec in YAML.", show_default=False)] = None,
    set: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a field: n_epochs=2, tuner.r=32.")
    ] = None,
    resume: Annotated[str | None, typer.Option(metavar="JOB", help="Continue this job from its checkpoint.")] = None,
    home: Annotated[Path | None, typer.Option(help="The data folder.", show_default="~/.tunewright")] = None,
) -> None:
    """Train a model, or a chain of them, without a server.

    A file with `stages` is a chain: each stage goes on from an earlier one.

    Ctrl-C saves a checkpoint and prints the command that continues from it.
    """
    from rich.console import Console

    from tunewright.cli.chain import train_chain
    from tunewright.cli.progress import run_foreground
    from tunewright.core.home import find_home

    console = Console()
    place = find_home(home).ensure()
    run = find_run(place, resume) if resume else begin(place, read_raw(job, set or []), console)
    if resume and set:
        raise typer.BadParameter("a resumed job keeps its spec; start a new job to change it", param_hint="--set")
    whole = run
    if run.job().stages:
        run, end = train_chain(place, whole, console)
    else:
        end = run_foreground(place, run, console)
    if end.data.get("status") == "succeeded":
        _done(run, end.data, console)
        return
    raise typer.Exit(exit_code(end.data))


def exit_code(end: dict[str, Any]) -> int:
    """The shell's exit code for an attempt that did not succeed: the worker's table (docs/reference/exit-codes.md)."""
    from tunewright.core import errors

    status = end.get("status")
    if status == "interrupted":
        return errors.Interrupted.exit_code
    if status == "paused":
        return errors.DiskFull.exit_code
    return next((c.exit_code for c in _tree(errors.TunewrightError) if c.code == end.get("code")), 70)


def _tree(top: type[Any]) -> list[type[Any]]:
    return [top, *(c for sub in top.__subclasses__() for c in _tree(sub))]


def begin(home: Home, raw: Any, console: Console) -> Run:
    """The run folder of what a job file describes: one job, or a chain."""
    from tunewright.cli.chain import new_chain
    from tunewright.core.chain import is_chain
    from tunewright.core.spec import parse_spec

    return new_chain(home, raw, console) if is_chain(raw) else new_run(home, parse_spec(raw), console)


def read_spec(path: Path | None, overrides: list[str]) -> JobSpec:
    """The spec of one job, as read_raw finds it."""
    from tunewright.core.spec import parse_spec

    return parse_spec(read_raw(path, overrides))


def read_raw(path: Path | None, overrides: list[str]) -> Any:
    """A YAML file with `--set` overrides, as plain data. Data paths in the file are relative to the file."""
    import yaml

    from tunewright.core.errors import SpecError

    if path is None and not overrides:
        raise SpecError("Give a job file (`tunewright train job.yaml`), `--set` fields, or `--resume JOB`.")
    raw: Any = {}
    if path is not None:
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        except OSError as e:
            raise SpecError(f"The job file '{path}' cannot be read: {e.strerror}.") from e
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            raise SpecError(f"The job file '{path}' is not valid YAML: {' '.join(str(e).split())}.") from e
        if isinstance(raw, dict):
            raw = beside(raw, path.parent)
    for item in overrides:
        raw = override(raw, item)
    return raw


def beside(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A job file's fields with their data paths, which are relative to the file, put into its folder."""
    found = {k: str(folder / v) if k in FILES and isinstance(v, str) else v for k, v in raw.items()}
    if isinstance(found.get("retain"), list | dict):
        found["retain"] = _with_paths(found["retain"], folder)
    mix = found.get("mix")
    if isinstance(mix, dict) and "files" in mix:
        found["mix"] = {**mix, "files": _with_paths(mix["files"], folder, paths=True)}
    elif isinstance(mix, list):
        found["mix"] = _with_paths(mix, folder, paths=True)
    stages = found.get("stages")
    if isinstance(stages, list):
        found["stages"] = [beside(s, folder) if isinstance(s, dict) else s for s in stages]
    elif isinstance(stages, dict):
        found["stages"] = {k: beside(s, folder) if isinstance(s, dict) else str(folder / s) for k, s in stages.items()}
    return found


def _with_paths(value: Any, folder: Path, paths: bool = False) -> Any:
    """Every `file` in the folder, and, where plain texts are paths, these."""
    if isinstance(value, list):
        return [_with_paths(v, folder, paths) for v in value]
    if isinstance(value, dict) and isinstance(value.get("file"), str):
        return {**value, "file": str(folder / value["file"])}
    return str(folder / value) if paths and isinstance(value, str) else value


def override(raw: Any, item: str) -> Any:
    """`raw` with one `key.sub=value` set; the value is read as YAML, so 3 is a number and true is a boolean."""
    import yaml

    from tunewright.core.errors import SpecError

    key, equals, text = item.partition("=")
    if not equals or not key or not isinstance(raw, dict):
        raise SpecError(f"'--set {item}' is not KEY=VALUE. Example: --set n_epochs=2")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise SpecError(f"'--set {item}': the value is not valid YAML.") from e
    head, _, rest = key.partition(".")
    if not rest:
        return {**raw, head: value}
    inner = raw.get(head, default_part(head))
    inner = {"name": inner} if isinstance(inner, str) else inner
    return {**raw, head: override(inner, f"{rest}={text}")}


def default_part(field: str) -> dict[str, Any]:
    """The part that a job has where its spec says nothing, so that one option of it can be set alone."""
    from tunewright.core.spec import KINDS, JobSpec

    return {"name": JobSpec.model_fields[field].default.name} if field in KINDS else {}


def find_run(home: Home, job_id: str) -> Run:
    """The run of a job id. Raises NotFound with the nearest id, StateError when there is nothing left to do."""
    from tunewright.core.errors import NotFound, StateError, did_you_mean
    from tunewright.core.run import list_runs

    runs = {run.id: run for run in list_runs(home)}
    if job_id not in runs:
        known = did_you_mean(job_id, runs) or " `tunewright jobs` lists what there is."
        raise NotFound(f"There is no job '{job_id}' in {home.root}.{known}")
    end = runs[job_id].end()
    if not runs[job_id].job().stages and end is not None and end.data.get("status") == "succeeded":
        raise StateError(f"The job {job_id} has finished; its model is {runs[job_id].job().name}.")
    return runs[job_id]


def new_run(home: Home, spec: JobSpec, console: Console) -> Run:
    """Check the spec against what is installed and the data row by row, then write the run folder."""
    from tunewright.core.ids import new_id
    from tunewright.core.spec import check_parts, extra_files
    from tunewright.jobs.describe import load_describe
    from tunewright.jobs.prepare import create_run, find_origin

    # what is quick to check comes first
    find_origin(spec.model, home)
    described = load_describe(home)
    spec = check_parts(spec, described)
    check_all_data(spec, console, described)
    more = {role: Path(file) for role, file in extra_files(spec).items()}
    validation = Path(spec.validation_file) if spec.validation_file else None
    return create_run(
        home, spec, job_id=new_id("ftjob-"), train_path=Path(spec.training_file), validation_path=validation, more=more
    )


def check_all_data(spec: JobSpec, console: Console, described: dict[str, Any]) -> None:
    """Every data file of a job, row by row. described: the describe file. Raises DataError, SpecError."""
    from tunewright.core.chain import files_of

    for role, file in files_of(spec).items():
        check_data(Path(file), WHAT[role.partition("-")[0]], spec, console, described)


def check_data(path: Path, what: str, spec: JobSpec, console: Console, described: dict[str, Any]) -> None:
    """Print the report when something is wrong, then raise the one DataError; SpecError for what the grader misses.

    what: training, validation, retained (in whatever format and shape) or mixed.
    """
    from tunewright.cli.report import print_report
    from tunewright.data.validate import check_file, raise_for
    from tunewright.jobs.checking import check_grader, usable_rows

    minimum, retained = spec.min_examples if what == "training" else 1, what == "retained"
    rules = {} if retained else {"format": spec.format, **usable_rows(spec, what, described)}
    report = check_file(path, min_examples=minimum, **rules)
    if report.n_problems:
        print_report(path.name, report, console)
    raise_for(report, what=what)
    if not retained:
        check_grader(spec, path, report.format, path.name)


def _done(run: Run, end: dict[str, Any], console: Console) -> None:
    from tunewright.cli.progress import measured_text

    name = run.job().name
    for line in measured_text(end):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Done. The model is {name}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Its files: {run.result}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Talk to it: tunewright chat {name}", markup=False, highlight=False, soft_wrap=True)
