"""Tuners that train single entries of the base's tensors, chosen once by the data, and leave a sparse delta.

The chosen entries of a tensor are one parameter of their own, which the optimizer updates; after each step they are put
into their places. So the optimizer does not know of anything else: no momentum and no weight decay can move another
entry, and its state has the size of the choice. A tensor's gradient is reduced to the chosen entries as soon as it is
there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tunewright.core.errors import SpecError
from tunewright.tuners import base
from tunewright.tuners.delta import SPARSE, WHOLE, Delta, Piece, put, read_delta, save_delta, take
from tunewright.tuners.files import copy_into
from tunewright.tuners.fisher import largest
from tunewright.tuners.whole_tensors import check_same, in_heads

SUFFIX = ".selected"


class Entries(base.Tuner):
    """The entries with the largest Fisher information over some rows. A subclass says how many. A head for rows is
    trained whole, and not counted. Memory holds the base's values of the entries, too."""

    model: nn.Module

    def count(self, n: int) -> int:
        """How many of n entries are trained."""
        raise NotImplementedError

    def attach(self, model: nn.Module, seed: int) -> nn.Module:
        self.model = model.requires_grad_(True)
        heads = set(in_heads(model))
        named = dict(model.named_parameters())
        self._whole = {name: p for name, p in named.items() if name in heads}
        self._dense = {name: p for name, p in named.items() if name not in heads}
        self._whole_base = {name: p.data for name, p in self._whole.items()}
        for p in self._whole.values():
            p.data = p.data.to(torch.float32, copy=True)
        self._at: dict[str, Tensor] = {}
        self._values: dict[str, nn.Parameter] = {}
        self._base: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] | None = None
        for name, p in self._dense.items():
            p.register_post_accumulate_grad_hook(partial(self._reduce, name))
        return model

    def trainable(self) -> dict[str, nn.Parameter]:
        return {**{f"{name}{SUFFIX}": v for name, v in self._values.items()}, **self._whole}

    def prepare(self, gradients: Callable[[int], Iterator[None]]) -> None:
        """Choose the entries, unless load() has brought them."""
        if self._values:
            return
        self._squares = {n: torch.zeros(p.shape, device=p.device) for n, p in self._dense.items()}
        try:
            for _ in gradients(self.options.examples):
                pass
            total = sum(p.numel() for p in self._dense.values())
            self._select(largest(self._squares, self.count(total)))
        finally:
            self._squares = None
        for p in self._whole.values():
            p.grad = None

    def after_step(self, step: int) -> None:
        for name, values in self._values.items():
            put(self._dense[name], self._at[name], values)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Do not call backward on a graph built outside within the block."""
        whole = {name: p.detach().clone() for name, p in self._whole.items()}
        copy_into(self._whole, self._whole_base, "the base model")
        for name, values in self._base.items():
            put(self._dense[name], self._at[name], values)
        try:
            yield
        finally:
            copy_into(self._whole, whole, "the trained model")
            self.after_step(0)

    def save(self, folder: Path, base: str) -> None:
        save_delta(folder, base, self._delta())

    def load(self, folder: Path) -> None:
        """Before prepare() the entries are taken over as well; after it they must be the same.

        Raises CheckpointError if the files are damaged, SpecError if they hold others than this job trains.
        """
        delta = read_delta(folder)
        sparse = {name: piece for name, piece in delta.items() if piece.kind == SPARSE}
        self._check(delta, sparse)
        if not self._values:
            self._select({name: piece.at for name, piece in sparse.items() if piece.at is not None})
        copy_into(self._whole, {n: p.values for n, p in delta.items() if n not in sparse}, f"'{folder.name}'")
        with torch.no_grad():
            for name, piece in sparse.items():
                self._values[name].copy_(piece.values.view_as(self._values[name]))
        self.after_step(0)

    def merge(self) -> nn.Module:
        return self.model

    @torch.no_grad()
    def _reduce(self, name: str, p: Tensor) -> None:
        """A tensor's gradient is there: keep what is asked of it, drop the rest."""
        grad, p.grad = p.grad, None
        assert grad is not None
        if self._squares is not None:
            self._squares[name].addcmul_(grad, grad)
        elif name in self._values:
            values = self._values[name]
            mine = take(grad, self._at[name]).to(values).view_as(values)
            values.grad = mine if values.grad is None else values.grad.add_(mine)

    def _select(self, at: dict[str, Tensor]) -> None:
        """Make parameters of these entries: a column where they are of a matrix, which optimizers decay."""
        self._at = {name: at[name] for name in self._dense if name in at}
        self._base = {name: take(self._dense[name], at) for name, at in self._at.items()}
        for name, start in self._base.items():
            values = start.to(torch.float32, copy=True)
            self._values[name] = nn.Parameter(values[:, None] if self._dense[name].ndim > 1 else values)

    def _delta(self) -> Delta:
        pieces = {
            n: Piece(SPARSE, tuple(self._dense[n].shape), v.view(-1), self._at[n]) for n, v in self._values.items()
        }
        return pieces | {name: Piece(WHOLE, tuple(p.shape), p) for name, p in self._whole.items()}

    def _check(self, delta: Delta, sparse: Delta) -> None:
        """Raise SpecError unless this job would train just these entries."""
        if self._values:
            check_same({n: p.kind for n, p in delta.items()}, {n: p.kind for n, p in self._delta().items()})
        else:
            check_same({n: WHOLE for n in delta if n not in sparse}, dict.fromkeys(self._whole, WHOLE))
        fits = all(n in self._dense and tuple(self._dense[n].shape) == p.shape for n, p in sparse.items())
        theirs = sum(p.values.numel() for p in sparse.values())
        mine = self.count(sum(p.numel() for p in self._dense.values()))
        same = fits and theirs == mine
        if self._values and same:
            same = all(torch.equal(self._at[name], p.at.to(self._at[name])) for name, p in sparse.items())  # type: ignore[union-attr]
        if not same:
            raise SpecError(
                f"The delta to continue from does not fit this job's tuner: it changes {theirs:,} entries, this job "
                f"trains {mine:,}{' others' if theirs == mine else ''}. Use the same options, or a tuner that trains "
                "all weights (full), which starts from base and delta together.",
                param="tuner",
            )
