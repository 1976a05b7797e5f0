"""SFT: mean negative log-likelihood of the supervised tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tunewright.objectives.base import ObjectiveCard, Options, TokenModel
from tunewright.ops.types import Batch, Term


class SFT:
    """loss = - sum_t w_t log p(y_t | y_<t) / sum_t w_t, the sums over the whole optimizer step.

    With label smoothing e the target is the true token with 1 - e and the whole vocabulary with e (Szegedy et al.,
    arXiv 1512.00567, section 7): log p(y) becomes (1 - e) log p(y) + e mean_v log p(v), in validation too.
    Terms: `loss`; `accuracy` (coef 0), the weighted share of tokens whose most likely prediction is the target.
    """

    class Options(Options):
        label_smoothing: float = Field(
            0.0, ge=0, lt=1, description="share of each target that is spread over the whole vocabulary"
        )

    card: ClassVar[ObjectiveCard] = ObjectiveCard(
        title="Supervised fine-tuning", shapes=("chat",), group_size=1, openai_method="supervised", beside=("text",)
    )

    def __init__(self, options: SFT.Options) -> None:
        self.options = options

    def weights(self, batch: Batch) -> dict[str, float]:
        weight = float(batch.weights_T.sum())
        return {"loss": weight, "accuracy": weight}

    def __call__(self, policy: TokenModel, batch: Batch, stats: Any = None) -> dict[str, Term]:
        weight = self.weights(batch)["loss"]
        smoothing = self.options.label_smoothing
        got = policy.token_stats(batch, want={"logp", "correct", *(["mean_logp"] if smoothing else [])})
        return {
            "loss": Term(-(self._smooth(got) * batch.weights_T).sum(), weight),
            "accuracy": Term((got["correct"] * batch.weights_T).sum().detach(), weight, coef=0.0),
        }

    def _smooth(self, got: dict[str, Tensor]) -> Tensor:
        e = self.options.label_smoothing
        return torch.lerp(got["logp"], got["mean_logp"], e) if e else got["logp"]
