"""Single answers marked good or bad: {"prompt", "completion", "label"} as in TRL, or {"messages", "label"}."""

from __future__ import annotations

from typing import Any

from tunewright.core.conversation import Conversation, Message
from tunewright.data.formats.base import Findings, Format, Row
from tunewright.data.formats.openai_chat import read_list
from tunewright.data.formats.prompt_completion import read_side

LABELS: dict[Any, bool] = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}


def convert(row: Row, line: int) -> Conversation:
    """The answer is the last message. Raises DataError with every problem of the row."""
    found = Findings(line)
    if "messages" in row:
        messages, path = read_list(row, "messages", found), "messages"
    else:
        prompt, answer = read_side(row, "prompt", "user", found), read_side(row, "completion", "assistant", found)
        messages, path = prompt + answer, "completion"
        if not found.problems and len(answer) != 1:
            found.add(f"has a completion of {len(answer)} messages; it must be one assistant message.", path)
    if not found.problems and (len(messages) < 2 or messages[-1].role != "assistant"):
        roles = ", ".join(m.role for m in messages)
        found.add(f"has the roles {roles}; it must end with an assistant message after a prompt.", path, roles)
    label = _label(row.get("label"), found)
    found.stop_if_any()
    return Conversation(messages=_unweighted(messages), label=label, source=line)


def _unweighted(messages: list[Message]) -> list[Message]:
    """Weights of turns say nothing here: the last message is the answer."""
    return [m.model_copy(update={"weight": None}) if m.weight is not None else m for m in messages]


def _label(value: Any, found: Findings) -> bool:
    key = value.strip().lower() if isinstance(value, str) else value
    if isinstance(key, str | bool | int | float) and key in LABELS:
        return LABELS[key]
    if value is None:
        found.missing("label")
    else:
        found.add(f"has the label {value!r:.80}, which is neither true nor false.", "label", value, ["true", "false"])
    return False


FORMAT = Format(
    name="unpaired",
    title="answers marked good or bad",
    needs=(("prompt", "completion", "label"), ("messages", "label")),
    example='{"prompt": "Hi", "completion": "Hello!", "label": true}',
    convert=convert,
    knows=frozenset({"prompt", "completion", "messages", "label"}),
)
