"""A create request for a chain: `tunewright.stages` (or `tunewright.chain`) beside OpenAI's own fields.

`model`, `training_file` and `validation_file` of the request are the first stage's; everything else is every stage's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tunewright.api import jobspec
from tunewright.api.idempotency import job_id_for
from tunewright.api.lookup import find_data_file, find_other, find_start
from tunewright.api.requests import CreateJob
from tunewright.api.state import Server
from tunewright.core.chain import PREFIX, Stages, check_stages, files_of, in_stage, parse_chain
from tunewright.core.durable import discard
from tunewright.core.errors import UserError
from tunewright.core.spec import JobSpec, Part
from tunewright.jobs.chain import create_chain
from tunewright.jobs.foreground import row_of
from tunewright.jobs.rows import FileRow, JobRow

PARAMS = {"train": "training_file", "validation": "validation_file"}


@dataclass(frozen=True)
class CheckedChain:
    """A request that can become a chain. files: by `STAGE/role`."""

    stages: Stages
    files: dict[str, FileRow]


def check_chain(server: Server, request: CreateJob, describe: Mapping[str, Any]) -> CheckedChain:
    """Everything that can be known before a chain is made. Raises UserError."""
    jobspec.refuse_wandb(request)
    if request.method is not None:
        raise UserError(
            "Each stage of a chain has its own method. Leave 'method' out and give the stages their 'objective'.",
            param="method",
        )
    own = dict(request.tunewright or {})
    jobspec.check_own_keys(own)
    numbers = {k: v for k, v in jobspec.shown_numbers(request).items() if v != "auto"}
    beside = {name: getattr(request, name) for name in ("model", "training_file", "validation_file", "seed", "suffix")}
    given = {k: v for k, v in {**beside, "metadata": request.metadata}.items() if v is not None}
    stages = parse_chain({**own, **numbers, **given})
    first = next(iter(stages))
    stages[first] = _inherited(stages[first], server)
    stages = check_stages(stages, dict(describe))
    files = {}
    for name, spec in stages.items():
        try:
            _find_models(server, spec)
            for role, file in files_of(spec).items():
                files[f"{name}/{role}"] = find_data_file(server, file, PARAMS.get(role, role))
        except UserError as e:
            raise in_stage(name, e) from e
    return CheckedChain(stages, files)


def _inherited(spec: JobSpec, server: Server) -> JobSpec:
    """The first stage with the tuner of what it continues from, as for a job alone."""
    start = find_start(server, spec.model)
    if start is None or start.kind not in ("adapter", "delta"):
        return spec
    asked = spec.tuner.model_dump() if "tuner" in spec.model_fields_set else None
    return spec.model_copy(update={"tuner": Part.model_validate(jobspec.inherited(start.tuner, asked))})


def _find_models(server: Server, spec: JobSpec) -> None:
    if not spec.model.startswith(PREFIX):
        find_start(server, spec.model, "model")
    find_other(server, spec.objective, "objective")


def create(
    server: Server, request: CreateJob, describe: Mapping[str, Any], idempotency_key: str | None, body: Any
) -> JobRow:
    """Check everything, write the chain's folder, index it. Raises UserError; then nothing was made."""
    found = check_chain(server, request, describe)
    with server.changing:
        job_id = job_id_for(server.home, idempotency_key, body)
        known = server.store.get_job(job_id)
        if known is not None:
            return known
        run = create_chain(
            server.home,
            found.stages,
            job_id=job_id,
            paths={key: server.home.blob(row.sha256) for key, row in found.files.items()},
            names={key: row.filename for key, row in found.files.items()},
        )
        try:
            row = replace(row_of(run), status="validating_files", started_by="api", suffix=request.suffix)
            server.store.add_job(row)
        except BaseException:
            discard(run.folder)
            raise
    return row
