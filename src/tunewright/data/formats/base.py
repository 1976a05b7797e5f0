"""What a format is: a value with its fields, a way to recognise it and a way to convert a row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from tunewright.core.conversation import Conversation
from tunewright.core.errors import DataError, Problem, did_you_mean
from tunewright.data.lines import BAD_FORMAT, Row


@dataclass(frozen=True)
class Format:
    """One way to write rows.

    needs: sets of fields; a row of this format has every field of one of them.
    example: the smallest row, as JSON, for messages and documentation.
    convert: (row, line) -> Conversation; raises DataError whose problems have line, field, value and what is allowed.
    knows: fields that convert reads (others are left alone and noted); empty if convert itself refuses unknown ones.
    weak: gives way to another format that also fits (a `text` field beside `instruction` and `output`).
    alone: a row with any other field is not one of this format.
    asked: never recognised by its fields, only taken where the job says so.
    """

    name: str
    title: str
    needs: tuple[tuple[str, ...], ...]
    example: str
    convert: Callable[[Row, int], Conversation]
    knows: frozenset[str] = frozenset()
    weak: bool = False
    alone: bool = False
    asked: bool = False

    def fits(self, row: Collection[str]) -> bool:
        if self.alone and not all(field in self.knows for field in row):
            return False
        return any(all(field in row for field in fields) for fields in self.needs)

    def detect(self, sample: Sequence[Collection[str]]) -> str | None:
        """Why the sample (rows, or just their field names) looks like this format, or None if it does not."""
        counts = [sum(all(f in row for f in fields) for row in sample) for fields in self.needs]
        most = max(counts)
        return f"{most} of the first {len(sample)} rows have {_spell(self.needs[counts.index(most)])}" if most else None

    @property
    def wants(self) -> str:
        return " or ".join(_spell(fields) for fields in self.needs)


def _spell(fields: Iterable[str]) -> str:
    return " + ".join(f"'{f}'" for f in fields)


class Findings:
    """The problems of one row, gathered so that all are told at once."""

    def __init__(self, line: int) -> None:
        self.line = line
        self.problems: list[Problem] = []

    def add(
        self, message: str, field: str = "", value: object = "", allowed: Iterable[str] = (), code: str | None = None
    ) -> None:
        shown = value if isinstance(value, str) else repr(value)
        kind = {} if code is None else {"code": code}
        self.problems.append(Problem(self.line, message, field, shown[:200], ", ".join(allowed), **kind))

    def unknown_keys(self, found: Row, known: Collection[str], who: str = "", path: str = "") -> None:
        """A problem for each key of `found` that is not known. who: 'message 3 ' or ''."""
        for key in found:
            if key not in known:
                self.add(
                    f'{who}contains an extra "{str(key)[:80]}".{did_you_mean(key, known)} '
                    f"Known: {', '.join(sorted(known))}.",
                    f"{path}{key}",
                    key,
                    sorted(known),
                    BAD_FORMAT,
                )

    def missing(self, key: str, hint: str = "", who: str = "", path: str = "") -> None:
        self.add(f'{who}is missing key "{key}".{" " + hint if hint else ""}', f"{path}{key}", code=BAD_FORMAT)

    def text(self, row: Row, key: str, *, needed: bool = True) -> str:
        """The text of a field ('' if it is absent and not needed), or a problem."""
        value = row.get(key)
        if value is None and not needed:
            return ""
        if value is None:
            self.missing(key)
        elif not isinstance(value, str):
            self.add(f"has {key} of type {kind_of(value)}; it must be text.", key, value, ["text"])
        elif needed and not value.strip():
            self.add(f"has an empty {key}.", key, value, ["text that is not empty"])
        else:
            return value
        return ""

    def stop_if_any(self) -> None:
        if self.problems:
            raise DataError(str(self.problems[0]), problems=self.problems, code=self.problems[0].code)


def kind_of(value: object) -> str:
    """A JSON word for a Python value's type."""
    names = {dict: "object", list: "array", str: "text", bool: "true/false", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
