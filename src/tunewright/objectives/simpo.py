"""SimPO: the preferred answer's mean log-probability shall be larger by a margin. No reference, no bias to length."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field

from tunewright.objectives import base
from tunewright.objectives.base import ObjectiveCard
from tunewright.objectives.pairs import Answers, Compared, Pairwise


class SimPO(Pairwise):
    """loss = -log s(beta m(y_w) - beta m(y_l) - gamma), m(y) the mean log-probability of y's tokens.

    Meng et al. 2024, arXiv 2405.14734, equation 6. An answer's reward is beta m(y).
    """

    class Options(base.Options):
        beta: float = Field(2.0, gt=0, le=100, description="factor of the mean log-probabilities")
        gamma: float = Field(1.0, ge=0, le=100, description="how much larger the preferred answer's reward should be")

    card: ClassVar[ObjectiveCard] = ObjectiveCard(
        title="Simple preference optimisation (SimPO)", shapes=("preference",), group_size=2, lr_factor=0.1
    )

    def compare(self, answers: Answers) -> Compared:
        rewards_P2 = self.options.beta * answers.mean_logp
        return Compared(-F.logsigmoid(rewards_P2[:, 0] - rewards_P2[:, 1] - self.options.gamma), rewards_P2)
