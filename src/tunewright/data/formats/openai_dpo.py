"""OpenAI's preference pairs: {"input": {"messages"}, "preferred_output": [...], "non_preferred_output": [...]}.

A number `margin` may say by how much the first is better; a reward model learns it.
"""

from __future__ import annotations

import math
from typing import Any

from tunewright.core.conversation import Conversation, Message
from tunewright.data.formats.base import Findings, Format, Row, kind_of
from tunewright.data.formats.openai_chat import read_list, read_options

PAIR = ("preferred_output", "non_preferred_output")
OLDER = ("preferred_completion", "non_preferred_completion")
INPUT_KEYS = ("messages", "tools", "parallel_tool_calls", "functions")


def convert(row: Row, line: int) -> Conversation:
    """A preference row. Raises DataError with every problem of the row."""
    found = Findings(line)
    names = OLDER if any(n in row for n in OLDER) and not any(n in row for n in PAIR) else PAIR
    found.unknown_keys(row, ("input", *names, "margin"))
    shared = row.get("input")
    messages: list[Message] = []
    tools = parallel = None
    if shared is None:
        found.missing("input")
    elif not isinstance(shared, dict):
        found.add(f"has input of type {kind_of(shared)}; it must be an object with messages.", "input", shared)
    else:
        found.unknown_keys(shared, INPUT_KEYS, "input ", "input.")
        messages = read_list(shared, "messages", found, "input.")
        tools, parallel = read_options(shared, found, "input.")
    if messages and not found.problems and messages[-1].role == "assistant":
        found.add("has an assistant message at the end of input.messages; the answer belongs to the outputs.", "input")
    pair = [_answer(row, name, found) for name in names]
    margin = _margin(row.get("margin"), found)
    found.stop_if_any()
    return Conversation(
        messages=messages,
        tools=tools,
        parallel_tool_calls=parallel,
        preferred=pair[0],
        rejected=pair[1],
        margin=margin,
        source=line,
    )


def _margin(value: Any, found: Findings) -> float | None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf):
        return value
    found.add(f"has the margin {value!r:.80}; it must be a number, 0 or above.", "margin", value, ["number from 0"])
    return None


def _answer(row: Row, name: str, found: Findings) -> list[Message]:
    """Exactly one assistant message."""
    before = len(found.problems)
    answer = read_list(row, name, found)
    if len(found.problems) == before and (len(answer) != 1 or answer[0].role != "assistant"):
        roles = ", ".join(m.role for m in answer)
        found.add(f"has {name} with the roles {roles}; it must be exactly one assistant message.", name, roles)
    return answer


FORMAT = Format(
    name="openai_dpo",
    title="OpenAI preference pairs",
    needs=(("input", *PAIR), ("input", *OLDER)),
    example='{"input": {"messages": [{"role": "user", "content": "Hi"}]}, '
    '"preferred_output": [{"role": "assistant", "content": "Hello!"}], '
    '"non_preferred_output": [{"role": "assistant", "content": "What?"}]}',
    convert=convert,
)
