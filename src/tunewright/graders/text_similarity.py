"""text_similarity: how alike a text is to a reference, from 0 to 1."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from tunewright.graders.base import Grade, GraderOptions, Seams, Text
from tunewright.graders.similarity import METRICS
from tunewright.graders.templates import Scope, parse_template


def _not_cosine(value: Any) -> Any:
    if value == "cosine":
        raise ValueError(
            "cosine compares embeddings, which OpenAI offers in evals only and this server does not have. Use one of: "
            f"{', '.join(METRICS)}"
        )
    return value


Metric = Annotated[
    Literal[
        "fuzzy_match", "bleu", "gleu", "meteor", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l"
    ],
    BeforeValidator(_not_cosine),
]  # fmt: skip


class TextSimilarity:
    """reward: `evaluation_metric` of `input` against `reference`; see similarity.py for each one's formula."""

    class Options(GraderOptions):
        type: Literal["text_similarity"]
        input: Text
        reference: Text
        evaluation_metric: Metric

    def __init__(self, options: TextSimilarity.Options, seams: Seams) -> None:
        self.metric = METRICS[options.evaluation_metric]
        self.templates = [parse_template(options.input), parse_template(options.reference)]

    def __call__(self, scope: Scope) -> Grade:
        text, reference = (t.render(scope) for t in self.templates)
        return Grade(self.metric(text, reference))

    def close(self) -> None:
        """Nothing is kept."""
