"""Whether the rows of a file have all that a grader's templates name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tunewright.core.errors import Problem
from tunewright.graders.base import Grader
from tunewright.graders.templates import Path, Unknown, look_up


def missing_variables(grader: Grader, items: Iterable[tuple[int, Mapping[str, Any]]]) -> Iterator[Problem]:
    """A problem for each row and variable that has no value there. items: line and what graders know of the row
    (core/conversation.py's item_of).

    A python grader reads what it likes, so nothing is said of it.
    """
    paths = sorted({path for t in grader.work.templates for path in t.paths if path[0] == "item"}, key=str)
    for line, item in items:
        for path in paths:
            try:
                look_up({"item": item}, path, written(path))
            except Unknown as e:
                field = ".".join(map(str, path[1:]))
                yield Problem(line, f"{e}", field, allowed=", ".join(item), code="invalid_variable_error")


def written(path: Path) -> str:
    """`item.answers[0].text` of its steps."""
    return str(path[0]) + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path[1:])
