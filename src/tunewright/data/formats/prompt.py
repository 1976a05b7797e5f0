"""Prompts without answers, for a teacher to answer: {"prompt": "…"}, or a list of chat messages."""

from __future__ import annotations

from tunewright.core.conversation import Conversation, Message
from tunewright.data.formats.base import Findings, Format, Row
from tunewright.data.formats.openai_chat import read_list


def convert(row: Row, line: int) -> Conversation:
    """Raises DataError with every problem of the row."""
    found = Findings(line)
    if isinstance(row.get("prompt"), list):
        messages = read_list(row, "prompt", found)
    else:
        messages = [Message.model_validate({"role": "user", "content": found.text(row, "prompt")})]
    if not found.problems and messages[-1].role == "assistant":
        found.add("has a prompt that ends with an assistant message; end it with a user message.", "prompt")
    found.stop_if_any()
    said = [m.model_copy(update={"weight": 0}) if m.role == "assistant" else m for m in messages]
    return Conversation(messages=said, source=line)


FORMAT = Format(
    name="prompt",
    title="prompts",
    needs=(("prompt",),),
    example='{"prompt": "Hi"}',
    convert=convert,
    knows=frozenset({"prompt"}),
    alone=True,
)
