"""Optimizers and learning-rate schedules: two tables. A schedule is a pure function of the step, so it has no state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from tunewright.core.registry import Table

OPTIMIZERS = Table("optimizer", {"adamw": "tunewright.train.optim:AdamW"})
SCHEDULES = Table(
    "schedule",
    {
        "constant": "tunewright.train.optim:Constant",
        "cosine": "tunewright.train.optim:Cosine",
        "linear": "tunewright.train.optim:Linear",
    },
)


@dataclass(frozen=True)
class Card:
    """The capability row of an optimizer or schedule."""

    title: str


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101); weight decay is decoupled and spares vectors (norms, biases)."""

    class Options(Options):
        weight_decay: float = Field(0.0, ge=0, le=1)
        beta1: float = Field(0.9, ge=0, lt=1)
        beta2: float = Field(0.999, ge=0, lt=1)
        eps: float = Field(1e-8, gt=0)

    card: ClassVar[Card] = Card("AdamW")

    @staticmethod
    def build(parameters: dict[str, nn.Parameter], lr: float, options: Any) -> torch.optim.Optimizer:
        """The optimizer over `parameters` in two groups: matrices (decayed) and vectors (not)."""
        groups = [
            {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": options.weight_decay},
            {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=lr,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            fused=True,
        )


class Warmup(Options):
    """warmup: share of all steps (below 1) or a number of steps (1 and more) in which the rate rises linearly."""

    warmup: float = Field(0.05, ge=0)

    def warm(self, step: int, total: int) -> tuple[float, float]:
        """(factor during warm-up or 1, progress 0..1 of what follows it). step: 1-based."""
        steps = self.warmup * total if self.warmup < 1 else self.warmup
        steps = min(math.ceil(steps), max(total - 1, 0))
        if step <= steps:
            return step / steps, 0.0
        return 1.0, (step - 1 - steps) / max(total - steps, 1)


class Constant:
    """The full rate after warm-up."""

    class Options(Warmup):
        pass

    card: ClassVar[Card] = Card("Constant")

    @staticmethod
    def factor(step: int, total: int, options: Any) -> float:
        return options.warm(step, total)[0]


class Linear:
    """Falls linearly to `min_factor` of the rate."""

    class Options(Warmup):
        min_factor: float = Field(0.0, ge=0, le=1)

    card: ClassVar[Card] = Card("Linear")

    @staticmethod
    def factor(step: int, total: int, options: Any) -> float:
        warm, progress = options.warm(step, total)
        return warm * (1 - (1 - options.min_factor) * progress)


class Cosine:
    """Falls along half a cosine to `min_factor` of the rate (arXiv 1608.03983, without restarts)."""

    class Options(Warmup):
        min_factor: float = Field(0.0, ge=0, le=1)

    card: ClassVar[Card] = Card("Cosine")

    @staticmethod
    def factor(step: int, total: int, options: Any) -> float:
        warm, progress = options.warm(step, total)
        return warm * (options.min_factor + (1 - options.min_factor) * 0.5 * (1 + math.cos(math.pi * progress)))


Kind = Literal["optimizer", "schedule"]


def optimizer_state(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, torch.Tensor]:
    """The optimizer's tensors by '<parameter name>|<key>'. names: id(parameter) -> name."""
    return {
        f"{names[id(p)]}|{key}": value.detach().contiguous()
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, torch.Tensor]
) -> None:
    """Put back what optimizer_state() returned."""
    optimizer.state.clear()
    for key, value in tensors.items():
        name, _, slot = key.rpartition("|")
        optimizer.state[parameters[name]][slot] = value
