"""Child-tuning F: each step trains a random part of all weights, drawn anew (Xu et al. 2021, arXiv 2109.05687)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from tunewright.ops.runtime import derive_seed
from tunewright.tuners import base
from tunewright.tuners.base import TunerCard
from tunewright.tuners.full import Full

LEVELS = 1 << 16
AT_ONCE = 1 << 24  # numbers whose old values are kept while they are updated


class ChildTuningF(Full):
    """In each step a weight trains with probability p, and its gradient is divided by p; the others keep their bits.

    Xu et al. 2021, section 3.1. The draw comes after clipping, as in the authors' code. Theirs masks the gradient only;
    here neither momentum nor weight decay moves a weight outside the draw, either.
    """

    class Options(base.Options):
        p: float = Field(
            0.3, gt=0, le=1, description="chance of a weight to be trained in a step; the paper: 0.2 to 0.4"
        )

    card: ClassVar[TunerCard] = TunerCard(
        title="Child-tuning F",
        artefact="weights",
        mergeable=True,
        identity_at_start=True,
        works_on_nf4=False,
        default_lr=1e-4,
        float32_base=True,
    )

    def attach(self, model: nn.Module, seed: int) -> nn.Module:
        self._seed = seed
        return super().attach(model, seed)

    @torch.no_grad()
    def update(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """A few tensors at a time, so that the old values of all are never held at once."""
        gradients = {name: p.grad for name, p in self.trainable().items()}
        for p in self.trainable().values():
            p.grad = None
        for some in _sets(self.trainable()):
            held = {name: (p.detach().clone(), self.mask(name, p, step)) for name, p in some.items()}
            for name, p in some.items():
                grad = gradients.pop(name)
                if grad is not None:
                    p.grad = grad.masked_fill_(~held[name][1], 0.0).mul_(LEVELS / self._level)
            optimizer.step()
            for name, p in some.items():
                old, mask = held[name]
                torch.where(mask, p, old, out=p)
                p.grad = None

    def mask(self, name: str, p: Tensor, step: int) -> Tensor:
        """Bool in the shape of `p`: the child network of a step, a function of (seed, step, name)."""
        generator = torch.Generator(p.device).manual_seed(derive_seed("child", self._seed, step, name))
        # four numbers of 16 bits from each of 64: drawing them is what takes long
        bits = torch.empty(-(-p.numel() // 4), dtype=torch.int64, device=p.device)
        drawn = bits.random_(-(1 << 63), None, generator=generator).view(torch.int16)[: p.numel()].view(p.shape)
        return drawn >= LEVELS // 2 - self._level

    @property
    def _level(self) -> int:
        """A weight trains in so many of LEVELS draws."""
        return max(1, round(self.options.p * LEVELS))


def _sets(parameters: dict[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters in sets of about AT_ONCE numbers (more where one alone has more)."""
    some: dict[str, nn.Parameter] = {}
    for name, p in parameters.items():
        if some and sum(q.numel() for q in some.values()) + p.numel() > AT_ONCE:
            yield some
            some = {}
        some[name] = p
    if some:
        yield some
