"""`tunewright log JOB --to tensorboard`: a job's curves in another tool, read from its run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tunewright.core.home import Home
    from tunewright.core.run import Run


def log(
    job: Annotated[str, typer.Argument(help="A job id, or the path of a run folder.", show_default=False)],
    to: Annotated[str, typer.Option(help="tensorboard, wandb or mlflow.", show_default=False)],
    dir: Annotated[
        Path | None, typer.Option(help="Where to write.", show_default="a folder of that name in the data folder")
    ] = None,
    follow: Annotated[bool, typer.Option(help="Go on until the job's worker ends.")] = False,
    home: Annotated[Path | None, typer.Option(help="The data folder.", show_default="~/.tunewright")] = None,
) -> None:
    """Copy a job's curves to TensorBoard, Weights & Biases or MLflow.

    Steps that were done again after a crash count once. Called again, it adds what is new and doubles nothing.
    """
    from tunewright.core.home import find_home
    from tunewright.jobs.loggers.base import feed, open_logger

    place = find_home(home)
    run = find(place, job)
    logger = open_logger(to, run, dir or place.root / to)
    n = feed(run, logger, follow=follow)
    print(f"{n:,} steps of {run.id} are in {logger.where()}")


def find(home: Home, job: str) -> Run:
    """The run of a job id or of a folder. Raises NotFound with the nearest id."""
    from tunewright.core.errors import NotFound, did_you_mean
    from tunewright.core.run import Run, list_runs

    if (Path(job) / "job.json").is_file():
        return Run(Path(job).absolute())
    runs = {run.id: run for run in list_runs(home)}
    if job not in runs:
        known = did_you_mean(job, runs) or " `tunewright jobs` lists what there is."
        raise NotFound(f"There is no job '{job}' in {home.root}.{known}")
    return runs[job]
