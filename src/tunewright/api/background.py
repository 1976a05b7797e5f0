"""What the server does beside answering: housekeeping, and leaving the processor to training."""

from __future__ import annotations

import asyncio
import logging
import os
import signal

from fastapi.concurrency import run_in_threadpool

from tunewright.api import idempotency
from tunewright.api.lookup import is_expired
from tunewright.api.state import Server
from tunewright.core.errors import TunewrightError
from tunewright.jobs.rows import WITH_WORKER

HOUSEKEEPING_SECONDS = 20.0
SHARING_SECONDS = 1.0
log = logging.getLogger(__name__)


def end_with_supervisor(task: asyncio.Task[None]) -> None:
    """Without its supervisor the server is of no use: end it, so that whoever keeps it alive starts it afresh."""
    if not task.cancelled():
        log.critical("the supervisor ended; the server ends with it", exc_info=task.exception())
        os.kill(os.getpid(), signal.SIGTERM)


async def keep_house(server: Server) -> None:
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


async def share_cpu(server: Server) -> None:
    """While a job trains, the engine takes one thread; afterwards all again."""
    while True:
        training = bool(await run_in_threadpool(server.store.jobs_with, WITH_WORKER))
        threads = 1 if training else None
        if server.engine.threads != threads:
            try:
                await server.engine.set_threads(threads)
            except TunewrightError as e:
                log.warning("the engine's threads could not be set: %s", e.message)
        await asyncio.sleep(SHARING_SECONDS)
