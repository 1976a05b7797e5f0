"""The HTTP server, put together: guards outside, a key on every route, OpenAI's paths and our own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI

from tunewright import __version__
from tunewright.api import background, errors
from tunewright.api.auth import check_exposure, require_key
from tunewright.api.guard import Envelope, HostOriginGuard, allowed_hosts
from tunewright.api.routes import (
    chat_completions,
    files,
    fine_tuning_jobs,
    graders,
    health,
    models,
    ours,
    recipes,
    rows,
)
from tunewright.api.state import Server
from tunewright.engine.client import EngineProcess
from tunewright.jobs.store import Store
from tunewright.jobs.supervisor import Supervisor

ROUTERS = (
    health.router,
    files.router,
    fine_tuning_jobs.router,
    models.router,
    chat_completions.router,
    ours.router,
    recipes.router,
    rows.router,
    graders.router,
)


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
            supervising=asyncio.create_task(supervisor.run()),
        )
        server.supervising.add_done_callback(background.end_with_supervisor)
        keeping = [asyncio.create_task(job(server)) for job in (background.keep_house, background.share_cpu)]
        try:
            yield
        finally:
            for task in (*keeping, server.supervising):
                task.cancel()
            await asyncio.wait((*keeping, server.supervising))
            # workers go on by themselves; the next server finds them
            await engine.aclose()
            store.close()

    return lifespan
