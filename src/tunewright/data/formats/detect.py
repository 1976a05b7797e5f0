"""Which format a file has, decided from the first rows, with the reason; or what each format would need."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tunewright.core.errors import nearest
from tunewright.data.formats import FORMATS
from tunewright.data.formats.base import Format

EXPECTED = "Unexpected file format, expected either prompt/completion pairs or chat messages."
# Other words for the fields of our formats, for the hint when nothing fits.
SYNONYMS = {
    "question": "prompt",
    "query": "prompt",
    "answer": "completion",
    "response": "completion",
    "reply": "completion",
    "dialog": "messages",
    "dialogue": "messages",
    "chat": "messages",
    "conversation": "conversations",
    "chosen": "preferred_output",
    "rejected": "non_preferred_output",
    "content": "text",
    "document": "text",
    "passage": "text",
}


@dataclass(frozen=True)
class Decision:
    """format: the row of FORMATS, or None if undecided. reason: why, in words for the user."""

    format: Format | None
    reason: str


def all_formats() -> list[Format]:
    """Those that rows can be recognised by."""
    return [f for f in map(FORMATS.load, FORMATS) if not f.asked]


def decide(sample: Sequence[Collection[str]]) -> Decision:
    """The format that fits most rows of the sample (field names of at least one row)."""
    formats = all_formats()
    hits = {f.name: sum(f.fits(row) for row in sample) for f in formats}
    most = max(hits.values())
    best = [f for f in formats if most and hits[f.name] == most]
    best = [f for f in best if not any(other is not f and _needs_more(other, f) for other in best)]
    if len(best) > 1:
        best = [f for f in best if not f.weak]
    if len(best) == 1:
        return Decision(best[0], f"{best[0].title}: {best[0].detect(sample)}.")
    return Decision(None, _ambiguous(best) if best else _unknown(sample[0], formats))


def _needs_more(other: Format, format: Format) -> bool:
    """Whether `other` asks for everything that `format` asks for, and for more."""
    return any(set(few) < set(many) for few in format.needs for many in other.needs)


def _ambiguous(best: list[Format]) -> str:
    fits = "; ".join(f"{f.name} ({f.wants})" for f in best)
    return f"The rows fit several formats: {fits}. Say which with `format`, or remove the fields that do not belong."


def _unknown(fields: Collection[str], formats: list[Format]) -> str:
    shown = ", ".join(f"'{f}'" for f in list(fields)[:20]) or "none"
    needs = "; ".join(f"{f.name} needs {f.wants}" for f in formats)
    renames, near = _nearest(fields, formats)
    hint = f" Nearest: {near}" + (f" (rename {', '.join(renames)})." if renames else ".") if near else ""
    return f"{EXPECTED} The fields found are {shown}.{hint} What each format needs: {needs}."


def _nearest(fields: Collection[str], formats: list[Format]) -> tuple[list[str], str]:
    """The format that the most fields come close to, and how to rename them."""
    best: tuple[float, list[str], str] = (0.0, [], "")
    for f in formats:
        for needed in () if f.alone else f.needs:
            renames, score = [], 0.0
            for want in needed:
                have = _stand_in(want, fields)
                score += 0 if have is None else 1 if have == want else 0.8
                if have and have != want:
                    renames.append(f"'{have}' to '{want}'")
            if score / len(needed) > best[0]:
                best = (score / len(needed), renames, f.name)
    return best[1], best[2]


def _stand_in(want: str, fields: Collection[str]) -> str | None:
    """The field that is probably meant to be `want`."""
    if want in fields:
        return want
    for field in fields:
        if SYNONYMS.get(field.lower()) == want or nearest(field, [want]) or nearest(want, [field]):
            return field
    return None
