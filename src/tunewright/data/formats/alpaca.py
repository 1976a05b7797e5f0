"""Alpaca: {"instruction", "input"?, "output", "system"?, "history"?}. A blank line joins instruction and input."""

from __future__ import annotations

from typing import Any

from tunewright.core.conversation import Conversation, Message
from tunewright.data.formats.base import Findings, Format, Row


def convert(row: Row, line: int) -> Conversation:
    """An Alpaca row as a conversation. Earlier turns of `history` are context; the last answer is trained too."""
    found = Findings(line)
    system, extra = found.text(row, "system", needed=False), found.text(row, "input", needed=False)
    instruction, output = found.text(row, "instruction"), found.text(row, "output")
    messages = [Message(role="system", content=system)] if system else []
    messages += _history(row.get("history"), found)
    found.stop_if_any()
    ask = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    messages += [Message(role="user", content=ask), Message(role="assistant", content=output)]
    return Conversation(messages=messages, source=line)


def _history(history: Any, found: Findings) -> list[Message]:
    """Pairs of [question, answer]."""
    if history in (None, "", []):
        return []
    pairs: list[Any] = history if isinstance(history, list) else [None]
    messages = []
    for j, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(t, str) for t in pair):
            found.add("has history that is not an array of [question, answer] texts.", f"history[{j}]", pair)
            return []
        messages += [Message(role="user", content=pair[0]), Message(role="assistant", content=pair[1])]
    return messages


FORMAT = Format(
    name="alpaca",
    title="Alpaca",
    needs=(("instruction", "output"),),
    example='{"instruction": "Translate to French", "input": "cheese", "output": "fromage"}',
    convert=convert,
    knows=frozenset({"instruction", "input", "output", "system", "history"}),
)
