"""Pairs of prompt and completion: two texts (one user turn, one assistant turn) or two lists of chat messages.

With lists, only the completion's assistant turns are trained, as in TRL's conversational prompt-completion rows.
"""

from __future__ import annotations

from tunewright.core.conversation import Conversation, Message
from tunewright.data.formats.base import Findings, Format, Row
from tunewright.data.formats.openai_chat import check_trainable, read_list


def convert(row: Row, line: int) -> Conversation:
    """Raises DataError with every problem of the row."""
    found = Findings(line)
    prompt, completion = read_side(row, "prompt", "user", found), read_side(row, "completion", "assistant", found)
    if completion:
        check_trainable(completion, found)
    found.stop_if_any()
    shown = [m.model_copy(update={"weight": 0}) if m.role == "assistant" else m for m in prompt]
    return Conversation(messages=shown + completion, source=line)


def read_side(row: Row, key: str, role: str, found: Findings) -> list[Message]:
    """The messages of one side; a text is one message of `role`."""
    if isinstance(row.get(key), list):
        return read_list(row, key, found)
    return [Message.model_validate({"role": role, "content": found.text(row, key)})]


FORMAT = Format(
    name="prompt_completion",
    title="prompt and completion",
    needs=(("prompt", "completion"),),
    example='{"prompt": "Hi", "completion": "Hello!"}',
    convert=convert,
    knows=frozenset({"prompt", "completion"}),
)
