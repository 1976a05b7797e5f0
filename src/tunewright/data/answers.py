"""What makes answers useless to learn a preference from: an empty one, or two that are the same."""

from __future__ import annotations

from collections.abc import Iterator

from tunewright.core.conversation import Conversation, Message
from tunewright.core.errors import Problem

PAIR = ("preferred", "rejected")


def unusable_answers(row: Conversation) -> Iterator[Problem]:
    """A problem for an empty answer of a preference or unpaired row, and for a pair with equal answers."""
    answers = {name: answer for name in PAIR if (answer := getattr(row, name)) is not None}
    if row.shape == "unpaired":
        answers = {"marked": row.messages[-1:]}
    for name, answer in answers.items():
        if all(_is_empty(m) for m in answer):
            yield Problem(row.source, f"has an empty {name} answer, of which nothing can be learned.", name)
    if row.shape == "preference" and row.preferred == row.rejected:
        text = "has the same text as preferred and as rejected answer, so it prefers nothing. Remove the row."
        yield Problem(row.source, text, "rejected", _shown(row.rejected))


def _is_empty(message: Message) -> bool:
    return not (message.content or "").strip() and not message.tool_calls


def _shown(answer: list[Message] | None) -> str:
    return " ".join(m.content or "" for m in answer or ())[:200]
