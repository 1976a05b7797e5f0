"""Adafactor: the gradient's square is kept as one row and one column of each matrix."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from tunewright.train.optim.base import Card, Options, decay_groups


class Adafactor:
    """Adafactor (Shazeer & Stern, arXiv 1804.04235, algorithms 4 and 5): almost no memory beside the gradients.

    The rate is the job's own, not the paper's 1 / sqrt(t), so that schedules mean what they say.
    """

    class Options(Options):
        weight_decay: float = Field(0.0, ge=0, le=1, description="decoupled; matrices only")
        decay_rate: float = Field(0.8, gt=0, le=1, description="memory of the square at step t is 1 - t ** -decay_rate")
        clip_threshold: float = Field(1.0, gt=0, description="largest root mean square of a matrix's update")
        eps: float = Field(1e-30, gt=0, description="added to the gradient's square")
        scale_parameter: bool = Field(
            False, description="multiply the rate by the matrix's own root mean square (relative rates, not for LoRA)"
        )
        min_scale: float = Field(1e-3, gt=0, description="least factor of scale_parameter")

    card: ClassVar[Card] = Card("Adafactor")

    @staticmethod
    def build(parameters: dict[str, nn.Parameter], lr: float, options: Any) -> torch.optim.Optimizer:
        return AdafactorOptimizer(decay_groups(parameters, options.weight_decay), lr, options)


class AdafactorOptimizer(torch.optim.Optimizer):
    """State: step, and row and col (means of the square over columns and rows) or, for vectors, exp_avg_sq."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, options: Any) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.options = options

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group["lr"], group["weight_decay"])

    def _update(self, p: Tensor, grad: Tensor, lr: float, weight_decay: float) -> None:
        o, state = self.options, self.state[p]
        if not state:
            state.update(_fresh(p))
        state["step"] += 1
        beta2 = 1.0 - state["step"].item() ** -o.decay_rate
        update = grad * _inverse_root(grad.square().add_(o.eps), state, beta2)
        update /= (_rms(update) / o.clip_threshold).clamp_(min=1.0)
        rate = lr * max(o.min_scale, _rms(p).item()) if o.scale_parameter else lr
        p.mul_(1 - rate * weight_decay)
        p.add_(update, alpha=-rate)


def _fresh(p: Tensor) -> dict[str, Tensor]:
    step = {"step": torch.tensor(0.0)}
    if p.ndim < 2:
        return {**step, "exp_avg_sq": torch.zeros_like(p)}
    return {**step, "row": p.new_zeros(p.shape[:-1]), "col": p.new_zeros((*p.shape[:-2], p.shape[-1]))}


def _inverse_root(square: Tensor, state: dict[str, Tensor], beta2: float) -> Tensor:
    """1 / sqrt(V), V the running mean of `square`: of a matrix, row x col / mean(row) (the paper's equation 5)."""
    if "exp_avg_sq" in state:
        return state["exp_avg_sq"].lerp_(square, 1 - beta2).rsqrt()
    row = state["row"].lerp_(square.mean(dim=-1), 1 - beta2)
    col = state["col"].lerp_(square.mean(dim=-2), 1 - beta2)
    return (row / row.mean(dim=-1, keepdim=True)).rsqrt()[..., None] * col.rsqrt()[..., None, :]


def _rms(x: Tensor) -> Tensor:
    return x.norm() / x.numel() ** 0.5
