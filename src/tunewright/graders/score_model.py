"""score_model: a model gives a number."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator

from tunewright.graders.base import Grade, Seams
from tunewright.graders.judging import JudgeOptions, make_judge, read_reason, read_result
from tunewright.graders.templates import Scope

Number = Annotated[float, Field(allow_inf_nan=False)]


class ScoreModel:
    """reward: `result` of the model's JSON answer, brought into `range` (0 to 1 if none is given)."""

    class Options(JudgeOptions):
        type: Literal["score_model"]
        range: list[Number] = Field(default=[0.0, 1.0], min_length=2, max_length=2)

        @field_validator("range")
        @classmethod
        def _rising(cls, value: list[float]) -> list[float]:
            if not value[0] < value[1]:
                raise ValueError("the first number must be below the second, like [0, 1]")
            return value

    def __init__(self, options: ScoreModel.Options, seams: Seams) -> None:
        self.low, self.high = options.range
        words = f"a number from {self.low:g} to {self.high:g}"
        self.judge = make_judge(options, seams, {"type": "number", "description": words}, words)
        self.templates = self.judge.templates

    def __call__(self, scope: Scope) -> Grade:
        return self.judge(scope, self.read, read_reason)

    def read(self, text: str) -> float:
        """Raises ValueError for an answer without a number."""
        value = read_result(text)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError("the judge's answer has no number as its result")
        return float(min(max(value, self.low), self.high))

    def close(self) -> None:
        """Nothing is kept."""
