"""GET /healthz: whether the server can be used, for scripts that wait for it. Needs no key and tells no secret."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from tunewright import __version__
from tunewright.api.schemas import Health
from tunewright.api.state import Server, server_of

router = APIRouter()
BROKEN = ("damaged", "ended", "failing", "broken")


@router.get("/healthz")
async def healthz(request: Request) -> JSONResponse:
    """200 when ready, 503 when something is broken."""
    server = server_of(request)
    database = "ok" if await run_in_threadpool(server.store.check) else "damaged"
    parts = {
        "database": database,
        "supervisor": "ended" if server.supervising.done() else "running",
        "engine": server.engine.state,
        "parts": _parts(server),
    }
    broken = {name for name, value in parts.items() if value in BROKEN}
    health = Health.model_validate({**parts, "status": "failing" if broken else "ready", "version": __version__})
    return JSONResponse(health.model_dump(), 503 if broken else 200)


def _parts(server: Server) -> str:
    if not server.describing.done():
        return "loading"
    return "ready" if server.describing.exception() is None else "broken"
