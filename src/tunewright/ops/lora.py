"""Products of frozen linear layers with their low-rank updates: y = x W^T + (x A^T) (s B)^T, forward and backward.

Layers that read the same input (q, k, v; gate and up) are one product. With the narrow result u = x A^T,
[x, u] [W, s B]^T is one wide product; backward likewise, with du = dy (s B) and [dy, du] [[W], [A]]. So an update is
added before anything is rounded. Rank 0 is a plain frozen layer. Outputs may be multiplied by numbers, called gains.
Two forms with the same numbers: TileProduct runs the AMX kernels on bfloat16 weights, TorchProduct runs torch in any
dtype. LoRA: Hu et al., arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from tunewright.ops.kernels import Kernels, addresses, double

BLOCK = 32
Epilogue = Literal["store", "add", "swiglu", "swiglu_backward", "bias", "gelu", "gelu_backward"]
Inner = Literal["", "in", "out"]
_EPILOGUES: dict[Epilogue, int] = {name: i for i, name in enumerate(get_args(Epilogue))}


@dataclass(frozen=True)
class LowRank:
    """One layer's update s * B A. a: [r, k], b: [n, r], trained in float32. scale: s."""

    a: Tensor
    b: Tensor
    scale: float


def padded(n: int) -> int:
    """n rounded up to whole blocks."""
    return -(-n // BLOCK) * BLOCK


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """[f, ...] twice -> [2 f, ...]: 16 rows of the gate, 16 of up, in turns (the layout of the SwiGLU kernels)."""
    f = gate.shape[0]
    return torch.stack([gate.view(f // 16, 16, *gate.shape[1:]), up.view(f // 16, 16, *up.shape[1:])], 1).reshape(
        2 * f, *gate.shape[1:]
    )


class Product:
    """What both forms share: sizes, buffers, and where each layer's rows and ranks lie.

    weights: [n_i, k] of the layers that read the same input. ranks: r_i, 0 for a layer without an update; all of them
    and what pads them to whole blocks are r. rows: for each layer the rows of the product's output that are its own.
    inner: whether `in` or `out`, what it reads or writes, is the inner side of a SwiGLU MLP, which the AMX kernels keep
    in blocks of 32 x 32 instead of rows.
    """

    def __init__(
        self,
        kernels: Kernels,
        weights: Sequence[Tensor],
        ranks: Sequence[int],
        rows: Sequence[Tensor | slice],
        inner: Inner = "",
    ) -> None:
        self.kernels, self.inner = kernels, inner
        self.n, self.k = sum(w.shape[0] for w in weights), weights[0].shape[1]
        self.dtype = weights[0].dtype
        self.rows = list(rows)
        ends = list(accumulate(ranks, initial=0))
        self.ranks = [slice(a, b) for a, b in pairwise(ends)]
        self.r = padded(ends[-1])
        self._begin(weights)
        self.set_updates([None] * len(ranks))

    def _begin(self, weights: Sequence[Tensor]) -> None:
        """Hold the weights."""
        raise NotImplementedError

    def set_updates(self, updates: Sequence[LowRank | None], gain: Tensor | None = None) -> None:
        """Which matrices are the updates from now on; refresh() takes over their values. None: that layer has none.
        gain: [n] float32, factors of the outputs, read where they lie."""
        self.updates, self.gain = list(updates), gain

    def refresh(self) -> None:
        """Take over the present values of the updates, where a copy of them is kept."""

    def forward(self, x: Tensor, u: Tensor, y: Tensor, epilogue: Epilogue = "store", *extra: Tensor) -> None:
        """x [tokens, k] -> y [tokens, n], gains included; fills u [tokens, r]. add: plus extra[0], and extra[1], if it
        is given, gets y without it; bias: plus the row extra[0]. swiglu: y is gate and up, plus the row extra[1] if it
        is given; extra[0] gets h. gelu: plus the row extra[0]; extra[1] gets gelu(y)."""
        raise NotImplementedError

    def backward(self, dy: Tensor, du: Tensor, dx: Tensor | None, epilogue: Epilogue = "store", *extra: Tensor) -> None:
        """dy [tokens, n], before the gains -> dx [tokens, k]; fills du [tokens, r]. swiglu_backward: extra is gu and
        where h goes, dx becomes dgu. gelu_backward: extra is y before gelu and where gelu(y) goes, dx becomes the
        gradient of that y. dx None: only du is computed.
        """
        raise NotImplementedError

    def before_gain(self, dy: Tensor, y: Tensor, dz: Tensor) -> Tensor:
        """dz = gain * dy, which may be dy; returns [n] float32, the sum of dy * y over the tokens."""
        raise NotImplementedError

    def set_weights(self, weights: Sequence[Tensor]) -> None:
        """Take over the present values of weights that are trained themselves."""
        raise NotImplementedError

    def weight_gradient(self, i: int, x: Tensor, dy: Tensor) -> Tensor:
        """[n_i, k] float32 of the i-th layer's weights, from what forward() and backward() read."""
        raise NotImplementedError

    def column_sums(self, dy: Tensor) -> Tensor:
        """[n] float32: dy summed over its rows, the gradient of a bias."""
        sums_N = torch.empty(self.n)
        self.kernels.rows("column_sums", dy.dtype, dy, dy.stride(0), sums_N, dy.shape[0], self.n)
        return sums_N

    def gradients(self, x: Tensor, u: Tensor, dy: Tensor, du: Tensor) -> list[tuple[Tensor, Tensor] | None]:
        """(dA, dB) of each layer that has an update, float32, from what forward() and backward() read and filled."""
        raise NotImplementedError


class TileProduct(Product):
    """On bfloat16 weights where they lie. n, k and the numbers of tokens must be multiples of 32."""

    def _begin(self, weights: Sequence[Tensor]) -> None:
        self._weights = [w.contiguous() for w in weights]
        self._places = [_place(rows) for rows in self.rows]
        self.addresses = torch.zeros(self.n // 16, dtype=torch.int64)
        for weight, (first, spread) in zip(self._weights, self._places, strict=True):
            groups = weight.shape[0] // 16
            self.addresses[first // 16 + spread // 16 * torch.arange(groups)] = addresses(weight)

    def set_updates(self, updates: Sequence[LowRank | None], gain: Tensor | None = None) -> None:
        """The updates as structs of C (linear.h, Update and Updated), numbers of 8 bytes each."""
        super().set_updates(updates, gain)
        table, self._sizes, at = [], [], 0
        for update, (first, spread), ranks in zip(self.updates, self._places, self.ranks, strict=True):
            r = ranks.stop - ranks.start
            n = update.b.shape[0] if update else 0
            scale = double(update.scale if update else 0.0)
            pointers = (update.a.data_ptr(), update.b.data_ptr()) if update else (0, 0)
            table.append([*pointers, ranks.start, r, n, first, spread, at, scale])
            self._sizes.append(n * r)
            at += n * r
        self._table = torch.tensor(table)
        sizes = (len(table), self.k, self.n, self.r, int(self.inner == "in"), int(self.inner == "out"))
        self.record = torch.tensor([self._table.data_ptr(), *sizes, 0 if gain is None else gain.data_ptr()])

    def set_weights(self, weights: Sequence[Tensor]) -> None:
        for own, weight in zip(self._weights, weights, strict=True):
            if own.data_ptr() != weight.data_ptr():
                own.copy_(weight)

    def forward(self, x: Tensor, u: Tensor, y: Tensor, epilogue: Epilogue = "store", *extra: Tensor) -> None:
        first, second = (*extra, None, None)[:2]
        other, h = (second, first) if epilogue == "swiglu" else (first, second)
        self._run(x, u, 0, y, epilogue, other, h)

    def backward(self, dy: Tensor, du: Tensor, dx: Tensor | None, epilogue: Epilogue = "store", *extra: Tensor) -> None:
        other, h = extra if extra else (None, None)
        self._run(dy, du, 1, dx, epilogue, other, h)

    def _run(
        self,
        x: Tensor,
        u: Tensor,
        turned: int,
        y: Tensor | None,
        epilogue: Epilogue,
        other: Tensor | None,
        h: Tensor | None,
    ) -> None:
        given = (self.record, self.addresses, x, u, x.shape[0], turned)
        self.kernels("linear_tiles", *given, y, _EPILOGUES[epilogue], other, h)

    def before_gain(self, dy: Tensor, y: Tensor, dz: Tensor) -> Tensor:
        sums = torch.empty(self.n)
        self.kernels("before_gain_tiles", self.record, dy, y, dz, dy.shape[0], sums)
        return sums

    def column_sums(self, dy: Tensor) -> Tensor:
        if self.inner != "out":
            return super().column_sums(dy)
        blocks = dy.view(dy.shape[0] // BLOCK, self.n // BLOCK, BLOCK, BLOCK)
        return blocks.sum((0, 2), dtype=torch.float32).flatten()

    @property
    def gradient_sizes(self) -> list[int]:
        """Numbers of the gradient of all A [r, k], of each layer's B, and the sums of before_gain()."""
        return [self.r * self.k, *self._sizes, *([] if self.gain is None else [self.n])]

    def gradients(self, x: Tensor, u: Tensor, dy: Tensor, du: Tensor) -> list[tuple[Tensor, Tensor] | None]:
        sizes = [self.r * self.k, *self._sizes]
        found = torch.empty(sum(sizes))
        self.kernels("update_gradients_tiles", self.record, x, u, dy, du, x.shape[0], found)
        return self.split_gradients(found.split(sizes))

    def split_gradients(self, parts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor] | None]:
        """gradients() of what the kernels wrote, in pieces of gradient_sizes (without the last, the sums)."""
        da_RK = parts[0].view(self.r, self.k)
        return [
            None if update is None else (da_RK[ranks], db.view_as(update.b))
            for update, ranks, db in zip(self.updates, self.ranks, parts[1:], strict=True)
        ]

    def weight_gradient(self, i: int, x: Tensor, dy: Tensor) -> Tensor:
        tokens, g_NK = x.shape[0], torch.empty(self._weights[i].shape)
        n = g_NK.shape[0]
        room = torch.empty(tokens * (n + self.k), dtype=self.dtype)
        self.kernels(
            "weight_gradient_tiles", self.record, *self._places[i], n, x, dy, tokens, g_NK, room, room[tokens * n :]
        )
        return g_NK


def _place(rows: Tensor | slice) -> tuple[int, int]:
    """(a layer's first row in its product, rows from one sixteen of its rows to the next)."""
    if isinstance(rows, slice):
        return rows.start, 16
    return int(rows[0]), int(rows[16] - rows[0]) if len(rows) > 16 else 16


class TorchProduct(Product):
    """In torch, any dtype and any processor; the weights are kept as [W, s B] and A."""

    def _begin(self, weights: Sequence[Tensor]) -> None:
        self._wide_NK = weights[0].new_zeros(self.n, self.k + self.r)
        self._a_RK = weights[0].new_zeros(self.r, self.k)
        self.set_weights(weights)

    def set_weights(self, weights: Sequence[Tensor]) -> None:
        for rows, weight in zip(self.rows, weights, strict=True):
            self._wide_NK[rows, : self.k] = weight.to(self.dtype)

    def refresh(self) -> None:
        a_RK, b_NR = self._a_RK.zero_(), self._wide_NK[:, self.k :].zero_()
        for update, rows, ranks in zip(self.updates, self.rows, self.ranks, strict=True):
            if update is not None:
                a_RK[ranks] = update.a.detach().to(self.dtype)
                b_NR[rows, ranks] = (update.scale * update.b.detach()).to(self.dtype)

    def forward(self, x: Tensor, u: Tensor, y: Tensor, epilogue: Epilogue = "store", *extra: Tensor) -> None:
        if self.r:
            torch.mm(x, self._a_RK.T, out=u)
        torch.mm(torch.cat([x, u], 1) if self.r else x, self._wide_NK.T, out=y)
        if self.gain is not None:
            y *= self.gain
        if epilogue == "add":
            for alone in extra[1:]:
                alone.copy_(y)
        if epilogue in ("add", "bias", "gelu"):
            y += extra[0]
        if epilogue == "gelu":
            extra[1].copy_(F.gelu(y))
        elif epilogue == "swiglu":
            h = extra[0]
            for bias in extra[1:]:
                y += bias
            self.kernels.rows("swiglu", self.dtype, y, y.stride(0), h, h.stride(0), y.shape[0], self.n // 2)

    def backward(self, dy: Tensor, du: Tensor, dx: Tensor | None, epilogue: Epilogue = "store", *extra: Tensor) -> None:
        if self.r:
            torch.mm(dy, self._wide_NK[:, self.k :], out=du)
        if dx is None:
            return
        to = dx if epilogue == "store" else torch.empty(dx.shape[0], self.k, dtype=self.dtype)
        torch.mm(dy, self._wide_NK[:, : self.k], out=to)
        if self.r:
            to += du @ self._a_RK
        if epilogue == "gelu_backward":
            y, h = extra
            h.copy_(F.gelu(y))
            dx.copy_(torch.ops.aten.gelu_backward(to, y))
        if epilogue == "swiglu_backward":
            gu, h = extra
            sizes = (gu, gu.stride(0), dx, dx.stride(0), h, h.stride(0), dy.shape[0], self.k)
            self.kernels.rows("swiglu_backward", self.dtype, to, to.stride(0), *sizes)

    def before_gain(self, dy: Tensor, y: Tensor, dz: Tensor) -> Tensor:
        sums = (dy * y.float()).sum(0)
        torch.mul(dy, self.gain, out=dz)  # type: ignore[arg-type]
        return sums

    def weight_gradient(self, i: int, x: Tensor, dy: Tensor) -> Tensor:
        return (dy[:, self.rows[i]].T @ x).float()

    def gradients(self, x: Tensor, u: Tensor, dy: Tensor, du: Tensor) -> list[tuple[Tensor, Tensor] | None]:
        db_RN, da_RK = (u.T @ dy).float(), (du.T @ x).float()
        return [
            None if update is None else (da_RK[ranks], (update.scale * db_RN[ranks][:, rows].T).contiguous())
            for update, rows, ranks in zip(self.updates, self.rows, self.ranks, strict=True)
        ]
