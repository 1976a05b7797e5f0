"""AdamW in float32, and with its moments in 8 bits."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from tunewright.train.optim.base import Card, Options, decay_groups


class AdamOptions(Options):
    weight_decay: float = Field(0.0, ge=0, le=1, description="decoupled; matrices only, not norms and biases")
    beta1: float = Field(0.9, ge=0, lt=1, description="memory of the gradient's mean")
    beta2: float = Field(0.999, ge=0, lt=1, description="memory of the gradient's square")
    eps: float = Field(1e-8, gt=0, description="added to the denominator")


class AdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101); weight decay is decoupled and spares vectors (norms, biases)."""

    class Options(AdamOptions):
        pass

    card: ClassVar[Card] = Card("AdamW")

    @staticmethod
    def build(parameters: dict[str, nn.Parameter], lr: float, options: Any) -> torch.optim.Optimizer:
        """The optimizer over `parameters` in two groups: matrices (decayed) and vectors (not)."""
        return torch.optim.AdamW(
            decay_groups(parameters, options.weight_decay),
            lr=lr,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            fused=True,
        )


class AdamW8bit:
    """AdamW with both moments in 8 bits, in blocks of 256 (Dettmers et al., arXiv 2110.02861): a quarter of the memory.

    Parameters of fewer than 4,096 numbers keep moments of 32 bits. On a CPU the package's own rounding of the moments
    was seen to differ once between equal runs, so a resumed job is near the uninterrupted one, not bit for bit.
    """

    class Options(AdamOptions):
        pass

    card: ClassVar[Card] = Card("AdamW, 8-bit state", needs="bitsandbytes", exact=False)

    @staticmethod
    def build(parameters: dict[str, nn.Parameter], lr: float, options: Any) -> torch.optim.Optimizer:
        from bitsandbytes.optim import AdamW8bit as Bitsandbytes  # type: ignore[import-not-found]

        return Bitsandbytes(
            decay_groups(parameters, options.weight_decay),
            lr=lr,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
        )
