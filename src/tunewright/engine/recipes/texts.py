"""Small operations on conversations that recipes are made of. Messages are never changed in place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tunewright.core.errors import UserError, nearest
from tunewright.engine.recipes.base import Message

_PLACE = re.compile(r"\{([a-z_]+)\}")
_SYSTEM = ("system", "developer")


def check_template(template: str, needed: Sequence[str]) -> str:
    """The template, if it has every needed place `{name}`. Raises ValueError, also for what looks like a misspelt one.

    All other braces are plain text, so that a template may hold JSON.
    """
    there = set(_PLACE.findall(template))
    for word in there - set(needed):
        near = nearest(word, needed)
        if near is not None:
            raise ValueError(f"it has the place {{{word}}}; did you mean {{{near}}}?")
    missing = [f"{{{name}}}" for name in needed if name not in there]
    if missing:
        raise ValueError(f"it must have the place {' and '.join(missing)}")
    return template


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with each `{name}` of `values` replaced, in one pass: what is filled in is not looked at again."""
    return _PLACE.sub(lambda m: values.get(m[1], m[0]), template)


def question(messages: Sequence[Message]) -> str:
    """The text of the last user message. Raises UserError if there is none."""
    said = next((m.get("content") for m in reversed(messages) if m.get("role") == "user"), None)
    if not isinstance(said, str):
        raise UserError("This model needs a user message with text in 'messages'.", param="messages")
    return said


def with_system(messages: Sequence[Message], text: str) -> list[Message]:
    """The conversation with `text` as its system message, in front of what the first one says already."""
    if not text:
        return list(messages)
    if messages and messages[0].get("role") in _SYSTEM:
        own = messages[0].get("content")
        return [{**messages[0], "content": f"{text}\n\n{own}" if own else text}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def after_system(messages: Sequence[Message], turns: Sequence[Message]) -> list[Message]:
    """The conversation with `turns` put in behind its system messages."""
    at = next((i for i, m in enumerate(messages) if m.get("role") not in _SYSTEM), len(messages))
    return [*messages[:at], *turns, *messages[at:]]


def with_question(messages: Sequence[Message], text: str) -> list[Message]:
    """The conversation with another text in its last user message."""
    at = max(i for i, m in enumerate(messages) if m.get("role") == "user")
    return [*messages[:at], {**messages[at], "content": text}, *messages[at + 1 :]]
