"""Plain text for continued pretraining: {"text": "…"}."""

from __future__ import annotations

from tunewright.core.conversation import Conversation
from tunewright.data.formats.base import Findings, Format, Row


def convert(row: Row, line: int) -> Conversation:
    found = Findings(line)
    text = found.text(row, "text")
    found.stop_if_any()
    return Conversation(text=text, source=line)


FORMAT = Format(
    name="text",
    title="plain text",
    needs=(("text",),),
    example='{"text": "Once upon a time …"}',
    convert=convert,
    knows=frozenset({"text"}),
    weak=True,
)
