"""Runs that `tunewright train` made without a server: found in the data folder and shown like any other job."""

from __future__ import annotations

import logging

from tunewright.core.errors import TunewrightError
from tunewright.core.run import JobFile, Run
from tunewright.jobs.chain import stage_list
from tunewright.jobs.launchers import Launcher
from tunewright.jobs.rows import JobRow
from tunewright.jobs.store import Store

log = logging.getLogger(__name__)


def adopt(store: Store, launcher: Launcher) -> None:
    """Index runs that the store does not know. They come in as running; the next tick sees what became of them."""
    known = store.job_ids()
    unknown = [Run(p) for p in store.home.runs.iterdir() if p.name not in known and (p / "job.json").is_file()]
    for run in sorted(unknown, key=lambda r: (r.folder / "job.json").stat().st_mtime_ns):
        begun = max(run.attempts(), default=0) > 0  # attempts/0 is the server's own journal
        if begun or launcher.alive(run):
            try:
                store.add_job(row_of(run))
            except (TunewrightError, ValueError, OSError) as e:
                log.warning("the run %s cannot be read: %s", run.id, e)


def row_of(run: Run) -> JobRow:
    """The row of a run whose only record is its folder."""
    job: JobFile = run.job()
    spec = job.spec
    stages = {name: stage.model_dump(mode="json") for name, stage in job.stages.items()}
    shown = {"stages": stage_list(job.stages, {})} if stages else {"chain": job.chain} if job.chain else None
    return JobRow(
        id=run.id,
        created_at=int(job.created_at),
        model=spec.model,
        base=job.base,
        name=job.name,
        training_file=spec.training_file,
        validation_file=spec.validation_file,
        spec=spec.model_dump(mode="json") | ({"stages": stages} if stages else {}),
        hyperparameters={
            "n_epochs": spec.n_epochs,
            "batch_size": spec.batch_size,
            "learning_rate_multiplier": spec.learning_rate_multiplier,
        },
        seed=spec.seed or 0,
        suffix=spec.suffix,
        metadata=spec.metadata,
        tunewright=shown,
        status="running",
        attempt=max(run.attempts(), default=0),
        started_by="foreground",
    )
