"""Events: append-only JSON lines with sequence numbers, one file an attempt. The only channel out of a worker.

A line: {"seq": 1, "time": 1790000000.0, "type": "metrics", "level": "info", "message": "…", "data": {…}}
Types: `message` (for people), `metrics` (one a step), `plan`, `resumed`, `checkpoint`, `phase` (a long phase with its
progress), `end` (the last line; data.status is succeeded, failed, paused or interrupted).
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tunewright.core.durable import disk_full_is_clear

TYPES = ("message", "metrics", "plan", "resumed", "checkpoint", "phase", "end")
LEVELS = ("info", "warn", "error")


@dataclass(frozen=True)
class Event:
    """One line. `seq` counts from 1 within its attempt; `time` is Unix seconds."""

    seq: int
    time: float
    type: str
    level: str
    message: str
    data: dict[str, Any] = field(default_factory=dict)
    attempt: int = 1


class EventWriter:
    """Appends events, each with a single write(); fsyncs once a second and whenever `sync()` is called."""

    def __init__(self, path: Path, attempt: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.attempt = attempt
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._seq = 0
        self._synced = time.monotonic()

    def write(self, type: str, message: str, data: dict[str, Any] | None = None, level: str = "info") -> Event:
        """Append one event and return it. Raises DiskFull when there is no space."""
        if type not in TYPES or level not in LEVELS:
            raise ValueError(f"no such event: {type}/{level}")
        self._seq += 1
        event = Event(self._seq, time.time(), type, level, message, data or {}, self.attempt)
        line = asdict(event)
        del line["attempt"]
        with disk_full_is_clear("events.jsonl"):
            raw = (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode()
            size = os.fstat(self._fd).st_size
            if os.write(self._fd, raw) != len(raw):
                os.ftruncate(self._fd, size)  # a line that comes later must not be appended to half of this one
                raise OSError(errno.ENOSPC, "No space left on device")
        if time.monotonic() - self._synced > 1.0:
            self.sync()
        return event

    def sync(self) -> None:
        with disk_full_is_clear("events.jsonl"):
            os.fsync(self._fd)
        self._synced = time.monotonic()

    def close(self) -> None:
        self.sync()
        os.close(self._fd)


def stream_events(path: Path, attempt: int = 1) -> Iterator[Event]:
    """The complete lines one after the other, in constant memory."""
    if not path.exists():
        return
    with open(path, "rb") as f:
        for line in f:
            if line.endswith(b"\n") and line.strip():
                yield Event(**json.loads(line), attempt=attempt)


def read_events(path: Path, attempt: int = 1, offset: int = 0) -> tuple[list[Event], int]:
    """The complete lines from byte `offset` on, and the offset after them. A torn last line waits for its end."""
    if not path.exists():
        return [], offset
    with open(path, "rb") as f:
        f.seek(offset)
        raw = f.read()
    end = raw.rfind(b"\n") + 1
    events = [Event(**json.loads(line), attempt=attempt) for line in raw[:end].splitlines() if line.strip()]
    return events, offset + end


def superseded(event: Event, resumed: Iterable[Event]) -> bool:
    """Whether the job later went back to before this event's step, so that the step was (or will be) done again.

    resumed: all `resumed` events of the job: of later attempts, and roll-backs within one. Only lines that belong to a
    step can be superseded.
    """
    if event.type not in ("metrics", "checkpoint"):
        return False
    step, line = event.data.get("step", 0), (event.attempt, event.seq)
    return any((r.attempt, r.seq) > line and step > r.data["step"] for r in resumed)


def current(events: Iterable[Event]) -> list[Event]:
    """The events of all attempts in order, without the superseded ones."""
    ordered = sorted(events, key=lambda e: (e.attempt, e.seq))
    resumed = [e for e in ordered if e.type == "resumed"]
    return [e for e in ordered if not superseded(e, resumed)]
