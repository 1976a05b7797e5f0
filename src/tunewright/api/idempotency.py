"""Idempotency-Key: a create that is sent again within a day gives the job of the first time, also after a crash."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from tunewright.core.durable import read_json, write_json
from tunewright.core.errors import UserError
from tunewright.core.home import Home
from tunewright.core.ids import new_id

SECONDS = 24 * 3600


def job_id_for(home: Home, key: str | None, body: Any) -> str:
    """The id that a create request's job has: the one noted under its key, else a new one (noted, if there is a key).

    body: the request; the same key with another request is refused. Call under the lock that serialises creates.
    """
    if not key:
        return new_id("ftjob-")
    request = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    place = _folder(home) / hashlib.sha256(key.encode()).hexdigest()
    known = read_json(place) if place.exists() else None
    if known is not None and time.time() - known["time"] < SECONDS:
        if known["request"] != request:
            raise UserError(
                "This Idempotency-Key was used for a different request in the last 24 hours. Use a new key.",
                code="idempotency_key_reused",
            )
        return known["job_id"]
    job_id = new_id("ftjob-")
    write_json(place, {"job_id": job_id, "request": request, "time": time.time()})
    return job_id


def sweep(home: Home) -> None:
    """Forget keys older than a day."""
    for place in _folder(home).iterdir():
        if place.stat().st_mtime < time.time() - SECONDS:
            place.unlink(missing_ok=True)


def _folder(home: Home) -> Path:
    folder = home.cache / "idempotency"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
