"""Prompts whose answers are graded: {"messages": [...], "answer": "Paris"}, as OpenAI's reinforcement method has them.

What a row has is for graders: `{{ item.answer }}`, and `{{ item.messages }}`, the prompt. An assistant message at the
end is no part of that; graders know it as `{{ item.reference_answer }}`, unless the row has such a field itself.
"""

from __future__ import annotations

from tunewright.core.conversation import REFERENCE, Conversation, Message, item_of
from tunewright.data.formats.base import Findings, Format, Row
from tunewright.data.formats.openai_chat import read_list, read_options


def convert(row: Row, line: int) -> Conversation:
    """A prompt with what graders know of it. Raises DataError with every problem of the row."""
    found = Findings(line)
    key = "messages" if "messages" in row or "prompt" not in row else "prompt"
    if isinstance(row.get(key), str):
        messages = [Message.model_validate({"role": "user", "content": found.text(row, key)})]
    else:
        messages = read_list(row, key, found)
    tools, parallel = read_options(row, found)
    item = item_of(row)
    if messages and messages[-1].role == "assistant":
        item |= {} if REFERENCE in row else {REFERENCE: messages[-1].content or ""}  # as text, also where it was parts
        messages = messages[:-1]
    if not found.problems and (not messages or messages[-1].role == "assistant"):
        found.add("has no message to answer; end the prompt with a user message.", key)
    found.stop_if_any()
    shown = [m.model_copy(update={"weight": 0}) if m.role == "assistant" else m for m in messages]
    return Conversation(messages=shown, tools=tools, parallel_tool_calls=parallel, item=item, source=line)


FORMAT = Format(
    name="reinforcement",
    title="prompts to be graded",
    needs=(("messages",), ("prompt",)),
    example='{"messages": [{"role": "user", "content": "The capital of France?"}], "answer": "Paris"}',
    convert=convert,
    asked=True,
)
