"""Pairs of {"prompt": "…", "completion": "…"}: one user turn and one assistant turn."""

from __future__ import annotations

from tunewright.core.conversation import Conversation, Message
from tunewright.data.formats.base import Findings, Format, Row


def convert(row: Row, line: int) -> Conversation:
    found = Findings(line)
    prompt, completion = found.text(row, "prompt"), found.text(row, "completion")
    found.stop_if_any()
    messages = [Message(role="user", content=prompt), Message(role="assistant", content=completion)]
    return Conversation(messages=messages, source=line)


FORMAT = Format(
    name="prompt_completion",
    title="prompt and completion",
    needs=(("prompt", "completion"),),
    example='{"prompt": "Hi", "completion": "Hello!"}',
    convert=convert,
    knows=frozenset({"prompt", "completion"}),
)
