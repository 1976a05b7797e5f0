"""Between a request and the engine: a bounded number at once, keep-alives, an end when the client goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from tunewright.api.errors import RateLimited
from tunewright.core.errors import Busy

Event = dict[str, Any]


class Slots:
    """At most `limit` generations at once; one more is answered 429, which the SDK retries by itself."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def take(self) -> None:
        """Take a slot. Raises RateLimited."""
        if self.used >= self.limit:
            raise RateLimited(
                f"The server is answering {self.used} requests, which is its limit. Try again in a second, or send "
                "fewer at once."
            )
        self.used += 1

    def give(self) -> None:
        self.used -= 1


class Generation:
    """One running generation. A task of its own reads the engine, so that waiting for it can time out harmlessly.

    events: those of engine/engine.py, up to and including `done`.
    """

    def __init__(self, events: AsyncGenerator[Event, None], slots: Slots) -> None:
        slots.take()
        self._slots = slots
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._pump(events))

    async def _pump(self, events: AsyncGenerator[Event, None]) -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    self._queue.put_nowait(event)
        except Busy as e:
            raise RateLimited(e.message) from e
        finally:
            self._queue.put_nowait(None)
            self._slots.give()

    async def next(self, timeout: float | None = None) -> Event | None:
        """The next event, or None at the end. Raises TimeoutError (nothing is lost) and what the engine reported."""
        event = await asyncio.wait_for(self._queue.get(), timeout)
        if event is None:
            await self._task  # raises what ended it
        return event

    async def stop(self) -> None:
        """End it; the engine notices that nobody listens and frees the request."""
        self._task.cancel()
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.exception()  # it was told by next(), or nobody is left to be told
