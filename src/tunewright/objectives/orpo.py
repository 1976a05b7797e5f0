"""ORPO: learn the preferred answer and raise its odds over the rejected one's, in one loss and without a reference."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tunewright.objectives import base
from tunewright.objectives.base import ObjectiveCard
from tunewright.objectives.pairs import Answers, Compared, Pairwise


class ORPO(Pairwise):
    """loss = -m(y_w) - beta log s(log odds(y_w) - log odds(y_l)), m(y) the mean log-probability of y's tokens.

    odds(y) = p / (1 - p), p = exp m(y) (Hong et al. 2024, arXiv 2403.07691, equations 2 to 7). The first part is over
    the answer, not the prompt. An answer's reward is beta m(y).
    """

    class Options(base.Options):
        beta: float = Field(0.1, gt=0, le=10, description="factor of the odds-ratio part (lambda in the paper)")

    card: ClassVar[ObjectiveCard] = ObjectiveCard(
        title="Odds-ratio preference optimisation (ORPO)", shapes=("preference",), group_size=2, lr_factor=0.2
    )

    def compare(self, answers: Answers) -> Compared:
        mean_P2 = answers.mean_logp
        odds_P2 = mean_P2 - log_1m_exp(mean_P2)
        loss_P = -mean_P2[:, 0] - self.options.beta * F.logsigmoid(odds_P2[:, 0] - odds_P2[:, 1])
        return Compared(loss_P, self.options.beta * mean_P2)


def log_1m_exp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact near 0 and far from it; where x is 0 it is taken as -1e-12."""
    x = x.clamp(max=-1e-12)
    near = x > -0.6931471805599453
    # each branch gets harmless values where the other one counts, for the sake of its gradient
    small, large = torch.where(near, x, -0.5), torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))
