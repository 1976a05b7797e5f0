"""A create request becomes a run folder, then a row. The folder is the truth, so it is complete before the answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunewright.api import jobspec
from tunewright.api.idempotency import job_id_for
from tunewright.api.lookup import find_data_file, find_other, find_start
from tunewright.api.requests import CreateJob
from tunewright.api.state import ORG, Server
from tunewright.core.durable import discard
from tunewright.core.spec import JobSpec, extra_files
from tunewright.jobs.prepare import create_run
from tunewright.jobs.rows import FileRow, JobRow


@dataclass(frozen=True)
class Checked:
    """A request that can become a job. more: the data files of other roles (core.spec.extra_files)."""

    spec: JobSpec
    train: FileRow
    validation: FileRow | None
    more: dict[str, FileRow]


def check(server: Server, request: CreateJob, describe: Mapping[str, Any]) -> Checked:
    """Everything that can be known before a job is made. Raises UserError."""
    jobspec.refuse_wandb(request)
    spec = jobspec.build_spec(request, describe, find_start(server, request.model))
    find_other(server, spec.objective, f"method.{request.method.type}" if request.method else "tunewright.objective")
    train = find_data_file(server, request.training_file, "training_file")
    other = request.validation_file
    validation = find_data_file(server, other, "validation_file") if other else None
    more = {
        role: find_data_file(server, file, f"tunewright.{role.partition('-')[0]}")
        for role, file in extra_files(spec).items()
    }
    return Checked(spec, train, validation, more)


def create(
    server: Server, request: CreateJob, describe: Mapping[str, Any], idempotency_key: str | None, body: Any
) -> JobRow:
    """Check everything, write the run folder, index it. Raises UserError; then nothing was made."""
    found = check(server, request, describe)
    spec, train, validation, more = found.spec, found.train, found.validation, found.more
    with server.changing:
        job_id = job_id_for(server.home, idempotency_key, body)
        known = server.store.get_job(job_id)
        if known is not None:
            return known
        run = create_run(
            server.home,
            spec,
            job_id=job_id,
            org=ORG,
            train_path=server.home.blob(train.sha256),
            validation_path=server.home.blob(validation.sha256) if validation else None,
            more={role: server.home.blob(row.sha256) for role, row in more.items()},
            names={
                "train": train.filename,
                **({"validation": validation.filename} if validation else {}),
                **{role: row.filename for role, row in more.items()},
            },
        )
        try:
            job = run.job()
            row = JobRow(
                id=job_id,
                created_at=int(job.created_at),
                model=request.model,
                base=job.base,
                name=job.name,
                training_file=train.id,
                validation_file=validation.id if validation else None,
                spec=job.spec.model_dump(mode="json"),
                method=jobspec.method_object(request, spec, describe),
                hyperparameters=jobspec.shown_numbers(request),
                seed=job.spec.seed or 0,
                suffix=request.suffix,
                metadata=request.metadata,
                tunewright=jobspec.echo(request, spec),
            )
            server.store.add_job(row)
        except BaseException:
            discard(run.folder)
            raise
    return row
