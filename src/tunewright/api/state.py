"""What the routes share while the server runs: the store, the supervisor, the engine, the describe file."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from tunewright.api.generation import Slots
from tunewright.core.home import Home
from tunewright.engine.client import EngineProcess
from tunewright.jobs.store import Store
from tunewright.jobs.supervisor import Supervisor

ORG = "personal"
ORGANIZATION_ID = f"org-{ORG}"


@dataclass
class Server:
    """Made by the lifespan of the app.

    describing: reads the describe file, which takes seconds the first time. changing: held while files and jobs are
    made or removed, because a file's bytes are shared by hash.
    """

    home: Home
    store: Store
    supervisor: Supervisor
    engine: EngineProcess
    open_access: bool
    describing: asyncio.Task[dict[str, Any]]
    supervising: asyncio.Task[None]
    changing: threading.Lock = field(default_factory=threading.Lock)
    slots: Slots = field(default_factory=lambda: Slots(64))

    async def describe(self) -> dict[str, Any]:
        """The options and capabilities of every tuner, objective, optimizer and schedule."""
        return await asyncio.shield(self.describing)


def server_of(request: Request) -> Server:
    return request.app.state.server
