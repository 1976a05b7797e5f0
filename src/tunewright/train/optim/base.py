"""What an optimizer and a schedule have in common: a capability row, an option block, which parameters decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn


@dataclass(frozen=True)
class Card:
    """The capability row. needs: the optional package without which the row cannot be used.

    exact: equal inputs give equal bits, so that a resumed job is the uninterrupted one.
    """

    title: str
    needs: str | None = None
    exact: bool = True


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")


def decay_groups(parameters: dict[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer: matrices (LoRA's too) decay, vectors (norms, biases, magnitudes) do not."""
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]
