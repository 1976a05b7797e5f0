"""Tool calls that a model wrote as `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, in OpenAI's shape."""

from __future__ import annotations

import json
import re
from typing import Any

from tunewright.core.ids import new_id

MARK = "<tool_call>"
_BLOCK = re.compile(r"<tool_call>\s*(\{.*?\})\s*(?:</tool_call>|$)", re.DOTALL)


def parse_tool_calls(text: str) -> list[dict[str, Any]]:
    """The calls in `text`, or none at all if a part of it is not a well-formed call."""
    blocks = _BLOCK.findall(text)
    calls = [call for block in blocks if (call := _parse(block)) is not None]
    rest = _BLOCK.sub("", text).strip()
    return calls if calls and len(calls) == len(blocks) and not rest else []


def _parse(block: str) -> dict[str, Any] | None:
    try:
        value = json.loads(block)
    except ValueError:
        return None
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": new_id("call_"), "type": "function", "function": {"name": name, "arguments": text}}
