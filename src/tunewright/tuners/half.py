"""Half fine-tuning: each round trains another half of every layer (Hui et al. 2024, arXiv 2404.18466)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from tunewright.ops.runtime import derive_seed
from tunewright.tuners import base
from tunewright.tuners.base import TunerCard
from tunewright.tuners.blocks import stacks
from tunewright.tuners.full import Full

ATTENTION, REST, VECTORS = "attention", "feed-forward", "norms"


class HalfFineTuning(Full):
    """Half of each layer's matrices train in a round, another half in the next; the others keep their bits.

    Of the attention's matrices, of the other matrices and of the norms half train (the paper's choice by category),
    drawn from (seed, round); of an odd number half of the layers train one more. Embeddings, last norm and head always
    do. What is frozen loses its optimizer state.
    """

    class Options(base.Options):
        round_steps: int | None = Field(None, ge=1, description="steps of a round; empty is an epoch")

    card: ClassVar[TunerCard] = TunerCard(
        title="Half fine-tuning",
        artefact="weights",
        mergeable=True,
        identity_at_start=True,
        works_on_nf4=False,
        default_lr=5e-5,
        float32_base=True,
    )

    def attach(self, model: nn.Module, seed: int) -> nn.Module:
        super().attach(model, seed)
        self._seed = seed
        self._kinds = categories(model)
        self._steps = self.options.round_steps
        self.frozen = self.frozen_in(0)
        return model

    def at_once(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.trainable().items() if name not in self.frozen}

    def begin(self, total_steps: int, steps_per_epoch: int) -> None:
        self._steps = self.options.round_steps or steps_per_epoch

    def before_step(self, step: int) -> None:
        self._freeze(self.frozen_in(self.round(step)))

    @contextmanager
    def all_trained(self) -> Iterator[None]:
        frozen = self.frozen
        self._freeze(frozenset())
        yield
        self._freeze(frozen)

    def update(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Frozen tensors have no gradient, so every optimizer passes over them."""
        for name, p in self.trainable().items():
            if name in self.frozen:
                optimizer.state.pop(p, None)
        optimizer.step()

    def round(self, step: int) -> int:
        """From 0. step: 1-based."""
        return 0 if self._steps is None else (step - 1) // self._steps

    def frozen_in(self, number: int) -> frozenset[str]:
        """Names of the parameters that do not train in a round, a function of (seed, round)."""
        frozen: set[str] = set()
        for kind, layers in self._kinds.items():
            odd = self._order([units[0][0] for units in layers if len(units) % 2], number, kind)
            one_more = set(odd[: len(odd) // 2])
            for first in ({unit[0]: unit for unit in units} for units in layers if units):
                n = len(first) // 2 + (next(iter(first)) in one_more)
                frozen.update(name for key in self._order(list(first), number, kind)[n:] for name in first[key])
        return frozenset(frozen)

    def _order(self, names: list[str], number: int, kind: str) -> list[str]:
        """The names, shuffled by a hash of each."""
        return sorted(names, key=lambda name: derive_seed("half", self._seed, number, kind, name))

    def _freeze(self, names: frozenset[str]) -> None:
        """Nobody computes a gradient of these from now on."""
        self.frozen = names
        for name, p in self.trainable().items():
            p.requires_grad_(name not in names)


Unit = list[str]  # a matrix and its bias, or a norm's vectors: names that freeze together


def categories(model: nn.Module) -> dict[str, list[list[Unit]]]:
    """{category: for each layer its units}."""
    found: dict[str, list[list[Unit]]] = {ATTENTION: [], REST: [], VECTORS: []}
    for path, layer in (block for stack in stacks(model) for block in stack):
        units: dict[str, dict[str, Unit]] = {kind: defaultdict(list) for kind in found}
        named = dict(layer.named_parameters())
        for name in named:
            owner, _, leaf = name.rpartition(".")
            kind = ATTENTION if "att" in owner.lower() else REST
            if all(named[n].ndim < 2 for n in named if n.rpartition(".")[0] == owner):
                kind = VECTORS
            # experts lie in one module as several matrices, each a unit of its own
            units[kind][owner if leaf in ("weight", "bias") else name].append(f"{path}.{name}")
        for kind, layers in found.items():
            layers.append(list(units[kind].values()))
    return found
