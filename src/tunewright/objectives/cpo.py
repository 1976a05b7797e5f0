"""CPO: DPO without its reference, and supervised training on the preferred answer so that it does not drift."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field

from tunewright.objectives import base
from tunewright.objectives.base import ObjectiveCard
from tunewright.objectives.pairs import Answers, Compared, Pairwise


class CPO(Pairwise):
    """loss = -log s(beta log p(y_w | x) - beta log p(y_l | x)) - alpha m(y_w), m(y) the mean log-probability.

    Xu et al. 2024, arXiv 2401.08417, equations 4 to 6; its second part averaged over the answer's tokens, as its
    authors ran it. An answer's reward is beta log p(y | x).
    """

    class Options(base.Options):
        beta: float = Field(0.1, gt=0, le=10, description="factor of the log-probabilities")
        alpha: float = Field(1.0, ge=0, le=100, description="factor of the supervised part; 0 leaves it out")

    card: ClassVar[ObjectiveCard] = ObjectiveCard(
        title="Contrastive preference optimisation (CPO)", shapes=("preference",), group_size=2, lr_factor=0.1
    )

    def compare(self, answers: Answers) -> Compared:
        rewards_P2 = self.options.beta * answers.logp
        loss_P = -F.logsigmoid(rewards_P2[:, 0] - rewards_P2[:, 1]) - self.options.alpha * answers.mean_logp[:, 0]
        return Compared(loss_P, rewards_P2)
