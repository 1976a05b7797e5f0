"""A reward model: which of two answers is better, learned from pairs, through a head with one output."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tunewright.objectives import base
from tunewright.objectives.base import ObjectiveCard, TokenModel
from tunewright.ops import segments
from tunewright.ops.types import Batch, Term


class Reward:
    """loss = - sum_g log sigmoid(r_g - r'_g - m_g) / number of pairs, r of the preferred, r' of the rejected answer.

    Bradley & Terry 1952 as in Ouyang et al. 2022 (arXiv 2203.02155, equation 1); the margin m_g of a row, 0 if it has
    none, as in Touvron et al. 2023 (arXiv 2307.09288, equation 2). center > 0 adds center * mean (r + r')^2, which
    keeps rewards near 0 (Eisenstein et al. 2023, arXiv 2312.09244, section 2).
    Terms: `loss`; `center`; with coef 0 `accuracy`, the share of pairs whose preferred answer has the higher reward,
    and `margin`, the mean of r - r'.
    """

    class Options(base.Options):
        center: float = Field(0.0, ge=0, le=100, description="factor of the mean squared sum of a pair's rewards")

    card: ClassVar[ObjectiveCard] = ObjectiveCard(
        title="Reward model", shapes=("preference",), group_size=2, head="reward"
    )

    def __init__(self, options: Reward.Options) -> None:
        self.options = options

    def weights(self, batch: Batch) -> dict[str, float]:
        return dict.fromkeys(("loss", "center", "accuracy", "margin"), float(len(_pairs(batch))))

    def __call__(self, policy: TokenModel, batch: Batch, stats: Any = None) -> dict[str, Term]:
        rows_P2 = _pairs(batch)
        reward_P2 = policy.scores(batch)[:, 0][rows_P2]
        gap_P = reward_P2[:, 0] - reward_P2[:, 1]
        n, seen_P = float(len(gap_P)), gap_P.detach()
        both_P = reward_P2.sum(-1) if self.options.center else reward_P2.detach().sum(-1)
        return {
            "loss": Term(-F.logsigmoid(gap_P - _margins(batch, rows_P2)).sum(), n),
            "center": Term(both_P.square().sum(), n, self.options.center),
            "accuracy": Term((seen_P > 0).sum().float(), n, coef=0.0),
            "margin": Term(seen_P.sum(), n, coef=0.0),
        }

    def report(self, means: dict[str, float]) -> dict[str, float]:
        return {"pair_accuracy": means["accuracy"], "reward_margin": means["margin"]}


def _pairs(batch: Batch) -> Tensor:
    """[P, 2] the segments of the pairs of which both answers have a token, the preferred one first."""
    rows_P2 = segments.pairs(batch)
    return rows_P2[(segments.sums(batch.weights_T, batch)[rows_P2] > 0).all(1)]


def _margins(batch: Batch, rows_P2: Tensor) -> Tensor:
    """[P] the rows' margins, 0 where there is none."""
    known_S = batch.per_segment.get("margin")
    return batch.weights_T.new_zeros(len(rows_P2)) if known_S is None else known_S[rows_P2[:, 0]].nan_to_num(0.0)
