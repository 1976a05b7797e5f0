"""multi: several graders, and a formula that makes one reward of theirs."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field

from tunewright.core.errors import SpecError
from tunewright.graders.base import Errors, Grade, Grader, GraderOptions, Seams, Usage, build
from tunewright.graders.formula import FUNCTIONS, NoNumber, parse_formula
from tunewright.graders.templates import Scope


class Multi:
    """reward = calculate_output over the rewards of `graders`, a map name -> grader; none of them is a `multi`.

    A grader that fails counts 0 and its errors are reported. sub_rewards and scores: each grader's reward.
    """

    class Options(GraderOptions):
        type: Literal["multi"]
        graders: dict[str, dict[str, Any]] = Field(min_length=1, max_length=64)
        calculate_output: str

    def __init__(self, options: Multi.Options, seams: Seams) -> None:
        self.graders, problems = _graders(options.graders, seams)
        try:
            self.formula = parse_formula(options.calculate_output, options.graders)
        except ValueError as e:
            problems.append(("calculate_output", f"calculate_output: {e}", "invalid_value"))
        if problems:
            self.close()
            text = "; ".join(message.rstrip(".") for _, message, _ in problems)
            param, _, code = problems[0]
            end = "" if text.endswith("?") else "."
            raise SpecError(f"The multi grader is not valid: {text}{end}", param=param, code=code)
        options.graders = {name: grader.spec for name, grader in self.graders.items()}
        self.templates = [t for grader in self.graders.values() for t in grader.work.templates]

    def __call__(self, scope: Scope) -> Grade:
        grades = {name: grader.graded(scope) for name, grader in self.graders.items()}
        rewards = {name: grade.reward for name, grade in grades.items()}
        errors: Errors = {name: value for grade in grades.values() for name, value in grade.errors.items()}
        why = [f"{name}: {grade.why}" for name, grade in grades.items() if grade.why]
        reward = 0.0
        try:
            reward = self.formula(rewards)
        except NoNumber as e:
            errors["formula_parse_error"] = True
            why.append(str(e))
        usage = _added([grade.usage for grade in grades.values()])
        return Grade(reward, errors, rewards, dict(rewards), "; ".join(why), usage)

    def close(self) -> None:
        for grader in self.graders.values():
            grader.close()


def _graders(
    specs: dict[str, dict[str, Any]], seams: Seams
) -> tuple[dict[str, Grader], list[tuple[str, str, str | None]]]:
    """The graders that are valid, and (param, message, code) of each problem."""
    graders: dict[str, Grader] = {}
    problems: list[tuple[str, str, str | None]] = []
    for name, spec in specs.items():
        where = f"graders.{name}"
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or name in FUNCTIONS:
            text = f"'{name[:80]}' cannot be a grader's name in a formula; use letters, digits and _, and no function's"
            problems.append((where, f"{text} name", "invalid_value"))
        elif spec.get("type") == "multi":
            problems.append((where, f"{where} is a multi; write its graders and its formula into this one", None))
        else:
            try:
                graders[name] = build(spec, where, seams)
            except SpecError as e:
                problems.append((e.param or where, f"{where}: {e.message}", e.code))
    return graders, problems


def _added(found: list[dict[str, Usage]]) -> dict[str, Usage]:
    """Tokens by model, over several grades."""
    total: dict[str, Usage] = {}
    for usage in found:
        for model, counts in usage.items():
            have = total.setdefault(model, {})
            for what, n in counts.items():
                have[what] = have.get(what, 0) + n
    return total
