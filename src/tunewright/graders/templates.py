"""OpenAI's templates: `{{ item.answer }}`, `{{ sample.output_text }}`, `{{ sample.choices[0].message.content }}`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tunewright.core.errors import did_you_mean

Scope = Mapping[str, Any]
Path = tuple[str | int, ...]

SAMPLE = ("output_text", "output_json", "output_tools", "choices")
NAMESPACES = ("item", "sample")
_VARIABLE = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_FIRST = re.compile(r"[^\W\d][\w-]*")
_STEP = re.compile(r"\s*(?:\.\s*([^\W\d][\w-]*)|\.\s*(\d+)|\[\s*(\d+)\s*\]|\[\s*(?:'([^']*)'|\"([^\"]*)\")\s*\])")


class Unknown(Exception):
    """A variable that has no value in this row or sample."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(why)
        self.path = path


@dataclass(frozen=True)
class Template:
    """A text with variables. parts: texts, and paths of variables, each with how it was written."""

    parts: tuple[str | tuple[str, Path], ...]

    @property
    def paths(self) -> list[Path]:
        return [part[1] for part in self.parts if not isinstance(part, str)]

    @property
    def fields(self) -> set[str]:
        """The fields of the row that it names."""
        return {str(path[1]) for path in self.paths if path[0] == "item" and len(path) > 1}

    def render(self, scope: Scope) -> str:
        """The text, with values in place: texts as they are, everything else as JSON. Raises Unknown."""
        return "".join(p if isinstance(p, str) else as_text(look_up(scope, p[1], p[0])) for p in self.parts)


def parse_template(text: str) -> Template:
    """Raises ValueError, which says what is wrong with which variable."""
    parts: list[str | tuple[str, Path]] = []
    at = 0
    for found in _VARIABLE.finditer(text):
        parts += [text[at : found.start()], (found[1].strip(), _path(found[1].strip()))]
        at = found.end()
    return Template(tuple(p for p in (*parts, text[at:]) if p != ""))


def _path(written: str) -> Path:
    steps = tuple(_steps(written))
    if steps[0] not in NAMESPACES:
        near = did_you_mean(str(steps[0]), NAMESPACES)
        raise ValueError(
            f"'{{{{ {written} }}}}' begins with '{steps[0]}'; a variable begins with item (the row) or sample (the "
            f"answer), like {{{{ item.answer }}}} or {{{{ sample.output_text }}}}.{near}"
        )
    if steps[0] == "sample" and len(steps) > 1 and steps[1] not in SAMPLE:
        near = did_you_mean(str(steps[1]), SAMPLE)
        raise ValueError(f"'{{{{ {written} }}}}': a sample has {', '.join(SAMPLE)}, no '{steps[1]}'.{near}")
    return steps


def _steps(written: str) -> Iterator[str | int]:
    step = _FIRST.match(written)
    while step is not None:
        yield _name(step)
        if step.end() == len(written):
            return
        step = _STEP.match(written, step.end())
    raise ValueError(
        f"'{{{{ {written} }}}}' is no variable; write names with dots and numbers in brackets, like "
        "{{ item.answers[0].text }}. Filters and conditions are not known here."
    )


def _name(step: re.Match[str]) -> str | int:
    if step.re is _FIRST:
        return step[0]
    name, number, index, single, double = step.groups()
    return int(number or index) if number or index else next(s for s in (name, single, double) if s is not None)


def look_up(scope: Scope, path: Path, written: str) -> Any:
    """The value at a path. Raises Unknown."""
    value: Any = scope
    for i, step in enumerate(path):
        known: list[str] = []
        if isinstance(value, Mapping):
            known = [str(k) for k in value]
            if str(step) in value:
                value = value[str(step)]
                continue
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
            continue
        where = ".".join(map(str, path[:i]))
        near = did_you_mean(str(step), known)
        raise Unknown(path, f"'{{{{ {written} }}}}' has no value: {where} has no '{step}'.{near}")
    return value


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
