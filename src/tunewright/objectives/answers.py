"""Distillation from a teacher's answers: another server answers the rows' prompts, and its answers are learned."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from tunewright.objectives import base
from tunewright.objectives.base import ObjectiveCard, TokenModel
from tunewright.objectives.sft import SFT
from tunewright.ops.types import Batch, Term


class Answers:
    """loss and terms of SFT, over the teacher's answers in place of the rows' own last ones (Kim & Rush 2016, arXiv
    1606.07947, section 3.2).

    They are asked for once, before the model is loaded; `answers/` in the run folder has them as chat rows.
    """

    class Options(base.Options):
        endpoint: str | None = Field(None, description="base URL of an OpenAI-compatible server, such as https://…/v1")
        model: str | None = Field(None, description="what the teacher is called there")
        system: str = Field("", max_length=100_000, description="told to the teacher only, not learned")
        temperature: float | None = Field(None, ge=0, le=2, description="of the teacher's answers; empty: its default")
        max_tokens: int = Field(1024, ge=1, le=1 << 20, description="of an answer; longer ones are left out")
        budget: int = Field(
            1_000_000, ge=1, description="tokens, read and written, after which no further row is asked for"
        )
        concurrency: int = Field(4, ge=1, le=64, description="rows that are asked for at the same time")

    card: ClassVar[ObjectiveCard] = ObjectiveCard(
        title="A teacher's answers", shapes=("chat", "prompt"), required=("endpoint", "model"), asks="teacher"
    )

    def __init__(self, options: Answers.Options) -> None:
        self.options = options
        self._next_token = SFT(SFT.Options(label_smoothing=0.0))

    def weights(self, batch: Batch) -> dict[str, float]:
        return self._next_token.weights(batch)

    def __call__(self, policy: TokenModel, batch: Batch, stats: Any = None) -> dict[str, Term]:
        return self._next_token(policy, batch)
