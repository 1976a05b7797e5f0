"""The HTTP server, put together: guards outside, a key on every route, OpenAI's paths and our own."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.concurrency import run_in_threadpool

from tunewright import __version__
from tunewright.api import errors, idempotency
from tunewright.api.auth import check_exposure, require_key
from tunewright.api.guard import Envelope, HostOriginGuard, allowed_hosts
from tunewright.api.lookup import is_expired
from tunewright.api.routes import chat_completions, files, fine_tuning_jobs, health, models, ours
from tunewright.api.state import Server
from tunewright.engine.client import EngineProcess
from tunewright.jobs.describe import load_describe
from tunewright.jobs.store import Store
from tunewright.jobs.supervisor import Supervisor

ROUTERS = (health.router, files.router, fine_tuning_jobs.router, models.router, chat_completions.router, ours.router)
HOUSEKEEPING_SECONDS = 20.0
log = logging.getLogger("tunewright.api")


def create_app(
    store: Store, *, host: str, port: int, open_access: bool = False, allow_hosts: Iterable[str] = ()
) -> FastAPI:
    """The app over an opened store, which it closes at its end.

    host, port: what the server is bound to. open_access: no key is asked; only on loopback.
    allow_hosts: more host names that it answers to, for a reverse proxy. Raises UserError for an unsafe combination.
    """
    check_exposure(host, open_access)
    app = FastAPI(
        title="tunewright",
        version=__version__,
        dependencies=[Depends(require_key)],
        lifespan=_lifespan(store, open_access),
        # the interactive pages load scripts from a CDN
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    errors.install(app)
    for router in ROUTERS:
        app.include_router(router)
    app.add_middleware(HostOriginGuard, allowed=allowed_hosts(host, port, allow_hosts))
    app.add_middleware(Envelope)
    return app


def _lifespan(store: Store, open_access: bool) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        supervisor = Supervisor(store, store.home)
        engine = EngineProcess(store.home)
        app.state.server = server = Server(
            home=store.home,
            store=store,
            supervisor=supervisor,
            engine=engine,
            open_access=open_access,
            describing=asyncio.create_task(run_in_threadpool(load_describe, store.home)),
            supervising=asyncio.create_task(supervisor.run()),
        )
        server.supervising.add_done_callback(_end_with_supervisor)
        keeping = asyncio.create_task(_keep_house(server))
        try:
            yield
        finally:
            keeping.cancel()
            server.supervising.cancel()
            await asyncio.wait({keeping, server.supervising})
            # workers save and end; the next server lets them go on
            await run_in_threadpool(supervisor.stop_workers)
            await engine.aclose()
            store.close()

    return lifespan


def _end_with_supervisor(task: asyncio.Task[None]) -> None:
    """Without its supervisor the server is of no use: end it, so that whoever keeps it alive starts it afresh."""
    if not task.cancelled():
        log.critical("the supervisor ended; the server ends with it", exc_info=task.exception())
        os.kill(os.getpid(), signal.SIGTERM)


async def _keep_house(server: Server) -> None:
    """Remove expired files and forget old idempotency keys, every now and then."""
    while True:
        await run_in_threadpool(_tidy, server)
        await asyncio.sleep(HOUSEKEEPING_SECONDS)


def _tidy(server: Server) -> None:
    idempotency.sweep(server.home)
    with server.changing:
        for row in server.store.list_files().data:
            if is_expired(row):
                server.store.delete_file(row.id)
