"""/v1/fine_tuning/jobs: create, list, retrieve, cancel, pause, resume, events, checkpoints."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.concurrency import run_in_threadpool

from tunewright.api import create_chain, create_job, present
from tunewright.api.body import json_body
from tunewright.api.errors import parse
from tunewright.api.lookup import find_job
from tunewright.api.requests import CreateJob
from tunewright.api.schemas import Job, JobCheckpoint, JobEvent, ListPage
from tunewright.api.state import Server, server_of
from tunewright.core.chain import is_chain

router = APIRouter()
JOBS = "/v1/fine_tuning/jobs"

Limit20 = Annotated[int, Query(alias="limit", ge=1, le=10_000)]


@router.post(JOBS)
async def make_job(
    request: Request,
    body: Annotated[Any, Depends(json_body)],
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
) -> Job:
    server = server_of(request)
    wanted = parse(CreateJob, body)
    describe = await server.describe()
    create = create_chain.create if is_chain(wanted.tunewright) else create_job.create
    return present.job(await run_in_threadpool(create, server, wanted, describe, idempotency_key, body))


@router.get(JOBS)
def list_jobs(request: Request, after: str | None = None, limit: Limit20 = 20) -> ListPage[Job]:
    """Newest first; `metadata[k]=v` selects, `metadata=null` selects jobs without any."""
    rows = server_of(request).store.list_jobs(after, limit, _metadata_filter(request))
    return present.page(rows, present.job)


def _metadata_filter(request: Request) -> dict[str, str] | str | None:
    query = request.query_params
    if query.get("metadata") == "null":
        return "null"
    return {k[len("metadata[") : -1]: v for k, v in query.items() if k.startswith("metadata[")} or None


@router.get(JOBS + "/{job_id}")
def retrieve_job(request: Request, job_id: str) -> Job:
    return present.job(find_job(server_of(request), job_id))


@router.post(JOBS + "/{job_id}/cancel")
async def cancel_job(request: Request, job_id: str) -> Job:
    return await _ask(server_of(request), job_id, "request_cancel")


@router.post(JOBS + "/{job_id}/pause")
async def pause_job(request: Request, job_id: str) -> Job:
    """The worker finishes its step, writes a checkpoint and ends; the job is then `paused`."""
    return await _ask(server_of(request), job_id, "request_pause")


@router.post(JOBS + "/{job_id}/resume")
async def resume_job(request: Request, job_id: str) -> Job:
    return await _ask(server_of(request), job_id, "request_resume")


async def _ask(server: Server, job_id: str, what: str) -> Job:
    await run_in_threadpool(find_job, server, job_id)
    await getattr(server.supervisor, what)(job_id)
    return present.job(await run_in_threadpool(find_job, server, job_id))


@router.get(JOBS + "/{job_id}/events")
def list_events(request: Request, job_id: str, after: str | None = None, limit: Limit20 = 20) -> ListPage[JobEvent]:
    """Newest first."""
    server = server_of(request)
    find_job(server, job_id)
    return present.page(server.store.list_events(job_id, after, limit), present.event)


@router.get(JOBS + "/{job_id}/checkpoints")
def list_checkpoints(
    request: Request, job_id: str, after: str | None = None, limit: Limit20 = 10
) -> ListPage[JobCheckpoint]:
    """Newest first: those that can be used as models."""
    server = server_of(request)
    find_job(server, job_id)
    return present.page(server.store.list_checkpoints(job_id, after, limit), present.checkpoint)
