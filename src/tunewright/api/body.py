"""Reading a JSON body with a limit, after the key was checked."""

from __future__ import annotations

import json
from typing import Any

from fastapi import Request

from tunewright.api.errors import TooLarge
from tunewright.core.errors import UserError

MAX_JSON_BYTES = 4 * 1024 * 1024


async def json_body(request: Request) -> Any:
    """A dependency: the parsed body ({} when empty). Raises TooLarge and UserError."""
    raw = bytearray()
    async for block in request.stream():
        raw += block
        if len(raw) > MAX_JSON_BYTES:
            raise TooLarge(f"The request body is larger than the limit of {MAX_JSON_BYTES // (1024 * 1024)} MB.")
    if not raw.strip():
        return {}
    try:
        return json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise UserError(
            f"We could not parse the JSON body of your request: {e}.".replace("\n", " "), code="invalid_json"
        ) from e


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")
