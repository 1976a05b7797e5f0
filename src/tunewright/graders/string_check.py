"""string_check: two texts are equal, or one holds the other. 1 or 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from tunewright.graders.base import Grade, GraderOptions, Seams, Text
from tunewright.graders.templates import Scope, parse_template

# (input, reference) -> whether it passes
OPERATIONS: dict[str, Callable[[str, str], bool]] = {
    "eq": lambda text, reference: text == reference,
    "ne": lambda text, reference: text != reference,
    "like": lambda text, reference: reference in text,
    "ilike": lambda text, reference: reference.casefold() in text.casefold(),
}


class StringCheck:
    """reward 1 if `input` is (`eq`), is not (`ne`), or holds (`like`; `ilike`: in any case) the `reference`."""

    class Options(GraderOptions):
        type: Literal["string_check"]
        input: Text
        reference: Text
        operation: Literal["eq", "ne", "like", "ilike"]

    def __init__(self, options: StringCheck.Options, seams: Seams) -> None:
        self.passes = OPERATIONS[options.operation]
        self.templates = [parse_template(options.input), parse_template(options.reference)]

    def __call__(self, scope: Scope) -> Grade:
        text, reference = (t.render(scope) for t in self.templates)
        return Grade(float(self.passes(text, reference)))

    def close(self) -> None:
        """Nothing is kept."""
