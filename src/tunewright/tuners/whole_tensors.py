"""Tuners that train some of the base's tensors, each one whole, and leave a delta of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from tunewright.core.errors import SpecError
from tunewright.tuners import base
from tunewright.tuners.delta import ADDED, WHOLE, Piece, read_delta, save_delta
from tunewright.tuners.files import copy_into
from tunewright.tuners.targets import whole_modules


class WholeTensors(base.Tuner):
    """A subclass says which; a head for rows always is. Memory holds the base's values of these tensors, too."""

    model: nn.Module

    def choose(self, model: nn.Module) -> list[str]:
        """Names of the parameters to train. Raises SpecError if there are none."""
        raise NotImplementedError

    def add(self, model: nn.Module) -> list[str]:
        """Add tensors that the base has not, as zeros; returns their names."""
        return []

    def refuse(self, model: nn.Module) -> None:
        self.add(model)
        self.choose(model)

    def attach(self, model: nn.Module, seed: int) -> nn.Module:
        self.model = model.requires_grad_(False)
        self._added = set(self.add(model))
        names = {*self.choose(model), *in_heads(model)}
        self._trained = {name: p for name, p in model.named_parameters() if name in names}
        self._base: dict[str, Tensor] = {}
        for name, p in self._trained.items():
            self._base[name] = p.data
            p.data = p.data.to(torch.float32, copy=True)
            p.requires_grad_(True)
        return model

    def trainable(self) -> dict[str, nn.Parameter]:
        return self._trained

    @contextmanager
    def off(self) -> Iterator[None]:
        """Do not call backward on a graph built outside within the block."""
        trained = {name: p.detach().clone() for name, p in self._trained.items()}
        copy_into(self._trained, self._base, "the base model")
        try:
            yield
        finally:
            copy_into(self._trained, trained, "the trained model")

    def save(self, folder: Path, base: str) -> None:
        pieces = {n: Piece(self._kind(n), tuple(p.shape), p) for n, p in self._trained.items()}
        save_delta(folder, base, pieces)

    def load(self, folder: Path) -> None:
        """Raises CheckpointError if the files are damaged, SpecError if they hold other tensors than are trained."""
        delta = read_delta(folder)
        theirs = {name: piece.kind for name, piece in delta.items()}
        check_same(theirs, {name: self._kind(name) for name in self._trained})
        copy_into(self._trained, {name: piece.values for name, piece in delta.items()}, f"'{folder.name}'")

    def merge(self) -> nn.Module:
        return self.model

    def _kind(self, name: str) -> str:
        return ADDED if name in self._added else WHOLE


def in_heads(model: nn.Module) -> list[str]:
    """Names of the parameters of what is trained whole in any case: a head for rows."""
    whole = set(whole_modules(model))
    return [name for name, _ in model.named_parameters() if set(name.split(".")) & whole]


def check_same(theirs: dict[str, str], mine: dict[str, str]) -> None:
    """Raise SpecError unless a saved delta holds the tensors that this job trains. Both: {name: kind}."""
    differing = sorted(name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name))
    if differing:
        raise SpecError(
            f"The delta to continue from does not fit this job's tuner: it holds {len(theirs)} tensors, this job "
            f"trains {len(mine)}, and {len(differing)} of them differ, first {differing[0]}. Use the same tuner with "
            "the same options, or one that trains all weights (full), which starts from base and delta together.",
            param="tuner",
        )
