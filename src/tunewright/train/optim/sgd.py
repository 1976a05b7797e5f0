"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import nn

from tunewright.train.optim.base import Card, Options, decay_groups


class SGD:
    """SGD with momentum (Sutskever et al. 2013); weight decay is the L2 term of the gradient. Wants a large rate."""

    class Options(Options):
        momentum: float = Field(0.9, ge=0, lt=1, description="share of the last update that goes on")
        nesterov: bool = Field(False, description="look ahead along the momentum")
        weight_decay: float = Field(0.0, ge=0, le=1, description="added to the gradient; matrices only")

        @model_validator(mode="after")
        def _needs_momentum(self) -> SGD.Options:
            if self.nesterov and self.momentum == 0:
                raise ValueError("nesterov needs a momentum above 0")
            return self

    card: ClassVar[Card] = Card("SGD with momentum")

    @staticmethod
    def build(parameters: dict[str, nn.Parameter], lr: float, options: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            decay_groups(parameters, options.weight_decay),
            lr=lr,
            momentum=options.momentum,
            nesterov=options.nesterov,
            foreach=True,
        )
