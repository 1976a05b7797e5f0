"""label_model: a model chooses a label; some of them pass."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tunewright.core.errors import did_you_mean
from tunewright.graders.base import Grade, Seams
from tunewright.graders.judging import JudgeOptions, make_judge, read_reason, read_result
from tunewright.graders.templates import Scope


class LabelModel:
    """reward 1 if the label that the model chose is one of `passing_labels`, else 0."""

    class Options(JudgeOptions):
        type: Literal["label_model"]
        labels: list[str] = Field(min_length=1, max_length=500)
        passing_labels: list[str] = Field(min_length=1)

        @model_validator(mode="after")
        def _known(self) -> LabelModel.Options:
            for label in self.passing_labels:
                if label not in self.labels:
                    near = did_you_mean(label, self.labels)
                    raise ValueError(f"passing_labels has '{label}', which is none of labels.{near}")
            return self

    def __init__(self, options: LabelModel.Options, seams: Seams) -> None:
        self.labels = {**{self.folded(label): label for label in options.labels}, **{x: x for x in options.labels}}
        self.passing = set(options.passing_labels)
        words = "one of " + ", ".join(f'"{label}"' for label in options.labels)
        self.judge = make_judge(options, seams, {"type": "string", "enum": options.labels}, words)
        self.templates = self.judge.templates

    def __call__(self, scope: Scope) -> Grade:
        return self.judge(scope, self.read, read_reason)

    def read(self, text: str) -> float:
        """Raises ValueError for an answer that is none of the labels."""
        value = read_result(text)
        said = value if isinstance(value, str) else text.strip()
        label = self.labels.get(said) or self.labels.get(self.folded(said))
        if label is None:
            raise ValueError(f"the judge's answer is none of {', '.join(dict.fromkeys(self.labels.values()))}")
        return float(label in self.passing)

    @staticmethod
    def folded(label: str) -> str:
        return label.strip(" \t\r\n\"'.`").casefold()

    def close(self) -> None:
        """Nothing is kept."""
