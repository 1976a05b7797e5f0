"""Pairs as most public sets have them: {"prompt", "chosen", "rejected"}, texts or lists of chat messages.

Lists may begin with the prompt, and `prompt` is then not needed: what both begin with is it, the rest the answers.
"""

from __future__ import annotations

from typing import Any

from tunewright.core.conversation import Conversation, Message
from tunewright.data.formats.base import Findings, Format, Row, kind_of
from tunewright.data.formats.openai_chat import read_list

PAIR = ("chosen", "rejected")


def convert(row: Row, line: int) -> Conversation:
    """A preference row. Raises DataError with every problem of the row."""
    found = Findings(line)
    prompt = _side(row, "prompt", "user", found) if row.get("prompt") is not None else []
    chosen, rejected = (_side(row, name, "assistant", found) for name in PAIR)
    found.stop_if_any()
    shared = _common(chosen, rejected)
    prompt = chosen[:shared] or prompt
    answers = {name: side[shared:] for name, side in zip(PAIR, (chosen, rejected), strict=True)}
    if not prompt:
        found.add("has no prompt: give it, or begin chosen and rejected with the same messages.", "prompt")
    for name, answer in answers.items():
        if [m.role for m in answer] != ["assistant"]:
            roles = ", ".join(m.role for m in answer) or "nothing"
            found.add(f"has {name} with {roles} after the prompt; it must be one assistant message.", name, roles)
    found.stop_if_any()
    return Conversation(messages=prompt, preferred=answers["chosen"], rejected=answers["rejected"], source=line)


def _common(a: list[Message], b: list[Message]) -> int:
    """How many messages both begin with, the answer at the end of each not among them."""
    n = min(len(a), len(b)) - 1
    return next((i for i in range(n) if a[i] != b[i]), max(n, 0))


def _side(row: Row, key: str, role: str, found: Findings) -> list[Message]:
    """The messages under `key`; a text, which may be empty, is one message of `role`."""
    value: Any = row.get(key)
    if isinstance(value, list):
        return read_list(row, key, found)
    if isinstance(value, str):
        return [Message.model_validate({"role": role, "content": value})]
    if value is None:
        found.missing(key)
    else:
        found.add(f"has {key} of type {kind_of(value)}; it must be text or messages.", key, value, ["text"])
    return []


FORMAT = Format(
    name="chosen_rejected",
    title="chosen and rejected answers",
    needs=(("prompt", *PAIR), PAIR),
    example='{"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}',
    convert=convert,
    knows=frozenset({"prompt", *PAIR}),
    weak=True,
)
