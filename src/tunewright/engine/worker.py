"""The thread that owns the engine: takes commands from the event loop, computes steps, sends events back."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from tunewright.core.errors import TunewrightError
from tunewright.engine.engine import FAILURES, Engine, EngineError, Event, first_line
from tunewright.engine.request import GenerateRequest

log = logging.getLogger(__name__)


class EngineThread:
    """Runs an Engine in a thread of its own. make: builds it, in that thread, to which torch's thread count belongs."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._make = make
        self._commands: queue.SimpleQueue[tuple[Callable[[Engine], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the current step."""
        self._commands.put(None)

    def submit(self, command: Callable[[Engine], Any]) -> Future[Any]:
        """Have the engine's thread call `command(engine)`; the future has its result or its TunewrightError."""
        future: Future[Any] = Future()
        self._commands.put((command, future))
        return future

    async def call(self, command: Callable[[Engine], Any]) -> Any:
        """submit(), awaited."""
        return await asyncio.wrap_future(self.submit(command))

    def _run(self) -> None:
        engine = self._make()
        busy = False
        while True:
            # an idle engine sleeps here until something comes; a busy one only looks
            while not busy or not self._commands.empty():
                item = self._commands.get()
                if item is None:
                    return
                self._obey(engine, *item)
                busy = engine.scheduler.busy
            busy = engine.step()

    def _obey(self, engine: Engine, command: Callable[[Engine], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(command(engine))
        except TunewrightError as e:
            future.set_exception(e)
        except FAILURES as e:
            log.exception("a command failed")
            future.set_exception(EngineError(f"The engine failed: {first_line(e)}"))


class Stream:
    """The events of one request, crossing from the engine's thread into an event loop."""

    def __init__(self, thread: EngineThread) -> None:
        self._thread = thread
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._number: int | None = None

    async def open(self, asked: GenerateRequest) -> None:
        """Queue the request. Raises what Engine.add_request raises; cancelled meanwhile, it leaves nothing behind."""
        future = self._thread.submit(lambda engine: engine.add_request(asked, self._emit))
        try:
            self._number = await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(self._drop)
            raise

    async def next(self) -> Event:
        return await self._events.get()

    def close(self) -> None:
        """Abort the request if it still runs."""
        number = self._number
        if number is not None:
            self._thread.submit(lambda engine: engine.abort(number))
            self._number = None

    def _emit(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def _drop(self, future: Future[Any]) -> None:
        if not future.cancelled() and future.exception() is None:
            number = future.result()
            self._thread.submit(lambda engine: engine.abort(number))
