"""Lion: every number moves by the same amount, in the direction of a sign."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from tunewright.train.optim.base import Card, Options, decay_groups


class Lion:
    """Lion (Chen et al., arXiv 2302.06675, algorithm 2): half of AdamW's memory; wants a third to a tenth of its rate.

    weight decay is decoupled, and wants three to ten times AdamW's.
    """

    class Options(Options):
        weight_decay: float = Field(0.0, ge=0, le=10, description="decoupled; matrices only")
        beta1: float = Field(0.9, ge=0, lt=1, description="share of the momentum in the update")
        beta2: float = Field(0.99, ge=0, lt=1, description="memory of the momentum")

    card: ClassVar[Card] = Card("Lion")

    @staticmethod
    def build(parameters: dict[str, nn.Parameter], lr: float, options: Any) -> torch.optim.Optimizer:
        return LionOptimizer(decay_groups(parameters, options.weight_decay), lr, (options.beta1, options.beta2))


class LionOptimizer(torch.optim.Optimizer):
    """State: exp_avg, the momentum."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """c = b1 m + (1 - b1) g; theta = theta - lr (sign(c) + decay theta); m = b2 m + (1 - b2) g."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group["lr"], group["betas"], group["weight_decay"])

    def _update(self, p: Tensor, grad: Tensor, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        state = self.state[p]
        if not state:
            state["exp_avg"] = torch.zeros_like(p)
        momentum = state["exp_avg"]
        update = torch.lerp(grad, momentum, betas[0]).sign_()
        p.mul_(1 - lr * weight_decay)
        p.add_(update, alpha=-lr)
        momentum.lerp_(grad, 1 - betas[1])
