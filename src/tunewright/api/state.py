"""What the routes share while the server runs: the store, the supervisor, the engine, the describe file."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from tunewright.api.generation import Slots
from tunewright.core.home import Home
from tunewright.engine.client import EngineProcess
from tunewright.jobs.describe import load_describe
from tunewright.jobs.store import Store
from tunewright.jobs.supervisor import Supervisor

ORG = "personal"
ORGANIZATION_ID = f"org-{ORG}"


@dataclass
class Server:
    """Made by the lifespan of the app.

    describing: reads the describe file, which takes seconds the first time. changing: held while files and jobs are
    made or removed, because a file's bytes are shared by hash. slots: generations at once. grading: graders at once.
    """

    home: Home
    store: Store
    supervisor: Supervisor
    engine: EngineProcess
    open_access: bool
    supervising: asyncio.Task[None]
    changing: threading.Lock = field(default_factory=threading.Lock)
    slots: Slots = field(default_factory=lambda: Slots(64))
    grading: Slots = field(default_factory=lambda: Slots(16))
    describing: asyncio.Task[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self._read_describe_file()

    def _read_describe_file(self) -> None:
        self.describing = asyncio.create_task(run_in_threadpool(load_describe, self.home))

    async def describe(self) -> dict[str, Any]:
        """The options and capabilities of every tuner, objective, optimizer and schedule."""
        if self.describing.done() and self.describing.exception() is not None:
            self._read_describe_file()  # what was missing may be there now
        return await asyncio.shield(self.describing)


def server_of(request: Request) -> Server:
    return request.app.state.server
