"""Continued pretraining: the next token of plain texts, all of it."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field

from tunewright.objectives.base import ObjectiveCard, Options, TokenModel
from tunewright.objectives.sft import SFT
from tunewright.ops.types import Batch, Term


class Pretrain:
    """loss = - sum_t log p(y_t | y_<t) / number of tokens, the sums over the whole optimizer step.

    A group is a block of up to max_length tokens (data/blocks.py). Chat rows of `mix` count as in SFT.
    Terms: `loss`; `accuracy` (coef 0), the share of tokens whose most likely prediction is the target.
    """

    class Options(Options):
        documents: Literal["separate", "joined"] = Field(
            "separate",
            description="separate: a block holds whole texts that do not see each other; joined: one stream of texts, "
            "cut every max_length tokens",
        )

    card: ClassVar[ObjectiveCard] = ObjectiveCard(
        title="Continued pretraining", shapes=("text",), group_size=0, beside=("chat",)
    )

    def __init__(self, options: Any) -> None:
        self.options = options
        self._next_token = SFT(SFT.Options(label_smoothing=0.0))

    def weights(self, batch: Batch) -> dict[str, float]:
        return self._next_token.weights(batch)

    def __call__(self, policy: TokenModel, batch: Batch, stats: Any = None) -> dict[str, Term]:
        return self._next_token(policy, batch)

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """`perplexity`: e to the mean loss of a token (Jelinek et al. 1977)."""
        return {"perplexity": math.exp(min(means["loss"], MOST))}


MOST = 700.0  # nats; e to that is still a number
