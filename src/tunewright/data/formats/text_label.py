"""Texts with a class, several classes or a value: {"text", "label"}, or two texts: {"text", "text_pair", "label"}."""

from __future__ import annotations

import math
from typing import Any

from tunewright.core.conversation import Conversation
from tunewright.data.formats.base import Findings, Format, Row, kind_of


def convert(row: Row, line: int) -> Conversation:
    """A label becomes text: 1 is `1`, true is `true`. A value is read from it again when it is learned."""
    found = Findings(line)
    text, pair = found.text(row, "text"), found.text(row, "text_pair", needed=False)
    label = _label(row.get("label"), found)
    found.stop_if_any()
    return Conversation(text=text, text_pair=pair or None, label=label, source=line)


def _label(value: Any, found: Findings) -> str | list[str]:
    """One label as text, or a list of different ones, which may be empty: no class applies."""
    if isinstance(value, list):
        names = [_one(v, found) for v in value]
        twice = next((n for i, n in enumerate(names) if n in names[:i]), "")
        if twice:
            found.add(f"has the label '{twice[:80]}' twice.", "label", twice)
        return names
    return _one(value, found)


def _one(value: Any, found: Findings) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, (int, float)) and math.isfinite(value):
        return str(int(value)) if value == int(value) else str(value)
    if value is None:
        found.missing("label")
    else:
        what = "an empty label" if value == "" else f"a label of type {kind_of(value)}"
        wanted = "it must be the name of a class, a list of them, or a number"
        found.add(f"has {what}; {wanted}.", "label", value, ["text", "list of texts", "number"])
    return ""


FORMAT = Format(
    name="text_label",
    title="texts with labels",
    needs=(("text", "label"),),
    example='{"text": "The room was clean and quiet.", "label": "positive"}',
    convert=convert,
    knows=frozenset({"text", "text_pair", "label"}),
)
