"""DPO: raise the preferred answer over the rejected one, measured against the model that training started from."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tunewright.objectives import base
from tunewright.objectives.base import ObjectiveCard
from tunewright.objectives.pairs import Answers, Compared, Pairwise


class DPO(Pairwise):
    """loss = -log s(beta (r(y_w) - r(y_l))), r(y) = log p(y | x) - log p_reference(y | x); or IPO's square of it.

    sigmoid: -(1 - e) log s(beta d) - e log s(-beta d), d = r(y_w) - r(y_l), e = label_smoothing (Rafailov et al. 2023,
    arXiv 2305.18290, equation 7; with e above 0 the conservative form of Mitchell, 2023: labels are wrong with
    probability e).
    ipo: (d - 1 / (2 beta))^2, d with each r divided by its answer's tokens (Azar et al. 2023, arXiv 2310.12036,
    equation 17, normalised as its authors ran it).
    An answer's reward is beta r(y). At step 1 every d is 0: the sigmoid's loss begins at ln 2.
    """

    class Options(base.Options):
        loss: Literal["sigmoid", "ipo"] = Field("sigmoid", description="of a pair's margin")
        beta: float = Field(
            0.1, gt=0, le=10, description="how close the model stays to the start: the larger, the closer"
        )
        label_smoothing: float = Field(
            0.0, ge=0, lt=0.5, description="share of the pairs that are believed to be labelled the wrong way round"
        )

    card: ClassVar[ObjectiveCard] = ObjectiveCard(
        title="Direct preference optimisation (DPO, IPO)",
        shapes=("preference",),
        group_size=2,
        needs_reference=True,
        openai_method="dpo",
        lr_factor=0.1,
    )

    def compare(self, answers: Answers) -> Compared:
        ipo = self.options.loss == "ipo"
        ratio_P2 = answers.ratio
        margin_P2 = ratio_P2 / answers.n if ipo else ratio_P2
        loss_P = (self._ipo if ipo else self._sigmoid)(margin_P2[:, 0] - margin_P2[:, 1])
        return Compared(loss_P, self.options.beta * ratio_P2)

    def _sigmoid(self, margin_P: Tensor) -> Tensor:
        z_P, e = self.options.beta * margin_P, self.options.label_smoothing
        return -(1 - e) * F.logsigmoid(z_P) - (e * F.logsigmoid(-z_P) if e else 0.0)

    def _ipo(self, margin_P: Tensor) -> Tensor:
        return (margin_P - 1 / (2 * self.options.beta)).square()
