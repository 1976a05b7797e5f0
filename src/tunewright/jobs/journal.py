"""A job's journal: attempts/0/events.jsonl, written by the server only. What the database says of a job can be read
back from it: lines for people, and lines `{"name": "job", "job": {…}}` with the fields of the job's row that changed.
A line is on the disk before the database knows it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from tunewright.core.durable import disk_full_is_clear, fsync_path
from tunewright.core.events import LEVELS, Event, read_events
from tunewright.core.run import Run

ATTEMPT = 0


@dataclass(frozen=True)
class Line:
    """One line to write. type, level, message and data as in core.events."""

    message: str
    level: str = "info"
    type: str = "message"
    data: dict[str, Any] = field(default_factory=dict)


def change(fields: dict[str, Any]) -> Line:
    """The line that records changed fields of the job's row."""
    return Line("", type="phase", data={"name": "job", "job": fields})


def changes_of(event: Event) -> dict[str, Any] | None:
    """The fields that a journal line changes, or None for any other line."""
    return event.data["job"] if event.attempt == ATTEMPT and event.data.get("name") == "job" else None


def read(run: Run, offset: int = 0) -> tuple[list[Event], int]:
    """The journal's complete lines from byte `offset` on, and the offset after them."""
    return read_events(run.attempt(ATTEMPT) / "events.jsonl", ATTEMPT, offset)


def size(run: Run) -> int:
    """Bytes of the journal; 0 when there is none."""
    path = run.attempt(ATTEMPT) / "events.jsonl"
    return path.stat().st_size if path.exists() else 0


def append(run: Run, lines: Iterable[Line], clock: Any = time.time) -> tuple[list[Event], int]:
    """Add lines durably; the events they became and the size after them. Raises DiskFull, having added nothing.

    A torn last line (the power went) is cut off first. The caller holds the store's write lock.
    """
    path = run.attempt(ATTEMPT) / "events.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    before, end = read(run)
    last = before[-1].seq if before else 0
    events = [Event(last + i, clock(), w.type, w.level, w.message, w.data, ATTEMPT) for i, w in enumerate(lines, 1)]
    if any(e.level not in LEVELS for e in events):
        raise ValueError(f"levels are {LEVELS}")
    raw = b"".join(_encode(e) for e in events)
    with disk_full_is_clear("the job's journal"), open(path, "r+b" if path.exists() else "xb", buffering=0) as f:
        f.truncate(end)
        f.seek(end)
        try:
            if f.write(raw) != len(raw):
                raise OSError(28, "No space left on device")
            os.fsync(f.fileno())
        except OSError:
            f.truncate(end)
            raise
    if not before:
        fsync_path(path.parent)
        fsync_path(path.parent.parent)
    return events, end + len(raw)


def _encode(event: Event) -> bytes:
    line = asdict(event)
    del line["attempt"]
    return (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode()
