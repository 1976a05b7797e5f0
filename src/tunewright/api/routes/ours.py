"""/v1/tunewright/*: what OpenAI has no endpoint for. The dashboard uses these, and anybody may."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.concurrency import run_in_threadpool

from tunewright import __version__
from tunewright.api import present
from tunewright.api.body import json_body
from tunewright.api.create_chain import check_chain
from tunewright.api.create_job import check
from tunewright.api.errors import parse
from tunewright.api.filecheck import check_training_file
from tunewright.api.lookup import base_models, find_file, find_job
from tunewright.api.requests import CheckFile, CreateJob, CreateKey, CreateSession
from tunewright.api.schemas import (
    BaseModelInfo,
    Description,
    EngineState,
    FileReport,
    JobReport,
    Key,
    MetricPoints,
    Session,
    WhoAmI,
)
from tunewright.api.state import ORGANIZATION_ID, server_of
from tunewright.core.allowed import QUANTIZATIONS
from tunewright.core.chain import is_chain
from tunewright.core.errors import AuthError, UserError
from tunewright.core.spec import JobSpec
from tunewright.engine.recipes.base import describe_recipes

router = APIRouter()
OURS = "/v1/tunewright"

Body = Annotated[Any, Depends(json_body)]


@router.get(OURS + "/describe")
async def describe(request: Request) -> Description:
    """What a job can be made of: the spec's JSON Schema, every part's options, the base models."""
    server = server_of(request)
    parts = await server.describe()
    infos = await run_in_threadpool(base_models, server)
    shown = [BaseModelInfo(id=m.name, **{f: getattr(m, f) for f in BaseModelInfo.FACTS}) for m in infos.values()]
    return Description(spec=JobSpec.model_json_schema(), parts=all_parts(parts), models=shown)


def all_parts(described: Mapping[str, Any]) -> dict[str, Any]:
    """The describe file's tables with those that need no torch, and in each row the package that is missing here."""
    held = {name: {"schema": {}, "defaults": {}, "card": asdict(q), "doc": q.doc} for name, q in QUANTIZATIONS.items()}
    tables = {**described, "quantization": held, "recipe": describe_recipes()}
    return {
        kind: rows if kind == "versions" else {name: with_missing(row) for name, row in rows.items()}
        for kind, rows in tables.items()
    }


def with_missing(row: Mapping[str, Any]) -> dict[str, Any]:
    needs = row["card"].get("needs")
    return {**row, "missing": needs if needs and find_spec(needs) is None else None}


@router.post(OURS + "/sessions")
def create_session(request: Request, body: Body) -> Session:
    """Exchange a one-time sign-in token (printed at the server's start) for a key."""
    key = server_of(request).store.redeem_signin_token(parse(CreateSession, body).token)
    if key is None:
        raise AuthError(
            "This sign-in link was used already or is too old. Restart `tunewright up` to get a new one.",
            code="invalid_signin_token",
            param="token",
        )
    return Session(key=key)


@router.post(OURS + "/keys")
def create_key(request: Request, body: Body) -> Key:
    """A new API key for a program; its text is shown only in this answer."""
    plain, row = server_of(request).store.add_key(parse(CreateKey, body).name)
    return Key(id=row.id, name=row.name, key=plain, created_at=row.created_at)


@router.get(OURS + "/whoami")
def whoami(request: Request) -> WhoAmI:
    key = getattr(request.state, "key", None)
    return WhoAmI(
        organization_id=ORGANIZATION_ID,
        open_access=server_of(request).open_access,
        key=key.name if key else None,
        version=__version__,
    )


@router.get(OURS + "/engine")
async def engine(request: Request) -> EngineState:
    """What the engine runs and has loaded; asking starts nothing."""
    process = server_of(request).engine
    return EngineState(state=process.state, stats=await process.health())


@router.post(OURS + "/files/{file_id}/check")
def check_file(request: Request, file_id: str, body: Body) -> FileReport:
    """Every line of a training file looked at, as the job would do it."""
    server = server_of(request)
    row = find_file(server, file_id)
    return check_training_file(server.home.blob(row.sha256), row, parse(CheckFile, body))


@router.post(OURS + "/jobs/check")
async def check_job(request: Request, body: Body) -> JobReport:
    """What POST /v1/fine_tuning/jobs would say to this body; nothing is made."""
    server = server_of(request)
    described = await server.describe()
    try:
        wanted = parse(CreateJob, body)
        await run_in_threadpool(check_chain if is_chain(wanted.tunewright) else check, server, wanted, described)
    except UserError as e:
        return JobReport(usable=False, message=e.message, param=e.param)
    return JobReport(usable=True)


@router.get(OURS + "/jobs/{job_id}/metrics")
def job_metrics(request: Request, job_id: str, after_step: Annotated[int, Query(ge=0)] = 0) -> MetricPoints:
    """The points of the job's charts with step > after_step."""
    server = server_of(request)
    row = find_job(server, job_id)
    return MetricPoints(
        job_id=job_id, status=present.job(row).status, data=server.store.metric_points(job_id, after_step)
    )
