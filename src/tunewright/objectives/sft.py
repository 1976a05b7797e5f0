"""SFT: mean negative log-likelihood of the supervised tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel

from tunewright.objectives.base import ObjectiveCard, Options, TokenModel
from tunewright.ops.types import Batch, Term


class SFT:
    """loss = - sum_t w_t log p(y_t | y_<t) / sum_t w_t, the sums over the whole optimizer step.

    Terms: `loss`; `accuracy` (coef 0), the weighted share of tokens whose most likely prediction is the target.
    """

    class Options(Options):
        pass

    card: ClassVar[ObjectiveCard] = ObjectiveCard(
        title="Supervised fine-tuning", shapes=("chat",), group_size=1, openai_method="supervised"
    )

    def __init__(self, options: BaseModel) -> None:
        self.options = options

    def weights(self, batch: Batch) -> dict[str, float]:
        weight = float(batch.weights_T.sum())
        return {"loss": weight, "accuracy": weight}

    def __call__(self, policy: TokenModel, batch: Batch, stats: Any = None) -> dict[str, Term]:
        weight = self.weights(batch)["loss"]
        got = policy.token_stats(batch, want={"logp", "correct"})
        return {
            "loss": Term(-(got["logp"] * batch.weights_T).sum(), weight),
            "accuracy": Term((got["correct"] * batch.weights_T).sum().detach(), weight, coef=0.0),
        }
