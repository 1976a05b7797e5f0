"""Live values: one poller for each thing, shared by all tabs that look at it, asleep when nobody looks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from tunewright.web.client import Api, ApiError

T = TypeVar("T")

ACTIVE = ("validating_files", "queued", "running")
FINAL = ("succeeded", "failed", "cancelled")
LOOK_SECONDS = 10.0


class Feed(Generic[T]):
    """The newest value of something that changes, fetched again and again while somebody looks.

    fetch: the old value -> the new value. pause: seconds until the next fetch, from the value.
    `version` grows with each new value or error; `error` is the last failure, None after a success.
    """

    def __init__(self, start: T, fetch: Callable[[T], Awaitable[T]], pause: Callable[[T], float]) -> None:
        self.value = start
        self.version = 0
        self.error: ApiError | None = None
        self._fetch = fetch
        self._pause = pause
        self._looked = 0.0
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    def look(self) -> T:
        """The newest value; keeps the poller alive for the next seconds."""
        self._looked = time.monotonic()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._poll(), name="feed")
        return self.value

    def hurry(self) -> None:
        """Fetch now instead of at the next turn."""
        self._wake.set()

    @property
    def idle(self) -> bool:
        return self._task is None or self._task.done()

    async def _poll(self) -> None:
        while time.monotonic() - self._looked < LOOK_SECONDS:
            self._wake.clear()
            await self._turn()
            seconds = self._pause(self.value) if self.error is None else 2.0
            try:
                await asyncio.wait_for(self._wake.wait(), seconds)
            except TimeoutError:
                continue

    async def _turn(self) -> None:
        before = (self.value, str(self.error))
        try:
            self.value, self.error = await self._fetch(self.value), None
        except ApiError as e:
            self.error = e
        if before != (self.value, str(self.error)):
            self.version += 1


@dataclass(frozen=True)
class JobView:
    """All that the page of a job shows. events and checkpoints newest first, points by step."""

    job: dict[str, Any] | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)
    settled: bool = False

    @property
    def status(self) -> str:
        return self.job["status"] if self.job else ""


def job_feed(api: Api, job_id: str) -> Feed[JobView]:
    """Follows one job: twice a second at most while it is active, slowly afterwards."""

    async def fetch(old: JobView) -> JobView:
        job = await api.job(job_id)
        if old.settled and old.job == job:
            return old
        newest = old.events[0]["id"] if old.events else None
        step = old.points[-1]["step"] if old.points else 0
        events, checkpoints, points = await asyncio.gather(
            api.events(job_id, until=newest), api.checkpoints(job_id), api.metrics(job_id, step)
        )
        return replace(
            old,
            job=job,
            events=[*events, *old.events] if events else old.events,
            checkpoints=checkpoints,
            points=[*old.points, *points] if points else old.points,
            settled=job["status"] in FINAL,
        )

    return Feed(JobView(), fetch, lambda view: 1.0 if view.status in ACTIVE else 3.0)


def jobs_feed(api: Api) -> Feed[list[dict[str, Any]] | None]:
    """Follows the list of jobs; None until the first answer."""

    async def fetch(_: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        return await api.jobs()

    def pause(jobs: list[dict[str, Any]] | None) -> float:
        return 2.0 if any(j["status"] in ACTIVE for j in jobs or []) else 4.0

    return Feed(None, fetch, pause)


def health_feed(api: Api) -> Feed[bool]:
    """Whether the API answers at all."""

    async def fetch(_: bool) -> bool:
        await api.request("GET", "/healthz")
        return True

    return Feed(True, fetch, lambda _: 5.0)
