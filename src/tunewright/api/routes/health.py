"""GET /healthz: whether the server can be used, for scripts that wait for it. Needs no key and tells no secret."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from tunewright import __version__
from tunewright.api.schemas import Health
from tunewright.api.state import Server, server_of

router = APIRouter()


@router.get("/healthz")
async def healthz(request: Request) -> JSONResponse:
    """200 when ready, 503 while starting or when a part is broken."""
    server = server_of(request)
    database = "ok" if await run_in_threadpool(server.store.check) else "damaged"
    parts = {"database": database, "supervisor": _supervisor(server), "engine": server.engine.state}
    health = Health(status=_status(server, parts), version=__version__, **parts)
    return JSONResponse(health.model_dump(), 200 if health.status == "ready" else 503)


def _supervisor(server: Server) -> str:
    return "stopped" if server.supervising.done() else "running"


def _status(server: Server, parts: dict[str, str]) -> Any:
    if parts["database"] != "ok" or parts["supervisor"] != "running" or parts["engine"] == "failing":
        return "failing"
    return "ready" if server.describing.done() else "starting"
