"""Attention of the fast paths over packed rows, forward and backward by hand: on the AMX kernels, or in torch.

Queries, keys and values lie side by side in one matrix [T, N], and so do their gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunewright.ops.attention import segment_attention
from tunewright.ops.kernels import Kernels

BOTH_WAYS = -1  # as a window: that of an encoder (attention.h)


@dataclass(frozen=True)
class Heads:
    """heads, kv: query and key/value heads. hd: width of a head. window: 0, the sliding window, or BOTH_WAYS."""

    heads: int
    kv: int
    hd: int
    window: int

    @property
    def widths(self) -> tuple[int, int, int]:
        """Columns of queries, keys and values."""
        return self.heads * self.hd, self.kv * self.hd, self.kv * self.hd


@dataclass(frozen=True)
class Segments:
    """Where the segments of a batch of n tokens lie.

    starts: [S + 1] for the kernels, to which a segment that others continue is one with them (ops/families.py); holes:
    [T, 2] which of its earlier tokens a token does not see, or None. bounds, prefixes: as ops.attention has them.
    """

    n: int
    starts: Tensor
    holes: Tensor | None
    bounds: list[int]
    prefixes: list[tuple[int, int]] | None


# (layer, queries [H, T, K], keys and values [Hkv, T, K]) -> [T, H, K]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Served:
    """A layer's attention that somebody else computes, who knows whose tokens these are."""

    heads: Heads
    layer: int
    attend: Attend

    def forward(self, qkv_TN: Tensor, out_TD: Tensor, at: Segments, lse_HT: Tensor | None = None) -> None:
        """Fill `out`."""
        parts = qkv_TN[: at.n].split(self.heads.widths, 1)
        q_HTK, k_HTK, v_HTK = (x.unflatten(1, (-1, self.heads.hd)).transpose(0, 1) for x in parts)
        out_TD[: at.n] = self.attend(self.layer, q_HTK, k_HTK, v_HTK).flatten(1)
        out_TD[at.n :] = 0


class TileAttention:
    """In bfloat16 on the AMX kernels."""

    def __init__(self, kernels: Kernels, heads: Heads) -> None:
        self.kernels, self.heads = kernels, heads

    def forward(self, qkv_TN: Tensor, out_TD: Tensor, at: Segments, lse_HT: Tensor | None = None) -> Tensor:
        """Fill `out`; returns what the backward needs: the log-sum-exp [heads, T], in `lse` if that is given."""
        lse_HT = torch.empty(self.heads.heads, out_TD.shape[0]) if lse_HT is None else lse_HT
        out_TD[at.n :] = 0
        self.kernels("attention_tiles", *self._sizes(qkv_TN, out_TD, at, lse_HT))
        return lse_HT

    def backward(
        self, d_TD: Tensor, qkv_TN: Tensor, out_TD: Tensor, at: Segments, lse_HT: Tensor, to_TN: Tensor
    ) -> None:
        """Fill `to` with the gradient of queries, keys and values."""
        to_TN[at.n :] = 0
        parts = (*to_TN.split(self.heads.widths, 1), to_TN.stride(0))
        sizes = self._sizes(qkv_TN, out_TD, at, lse_HT)
        self.kernels("attention_backward_tiles", *sizes, d_TD, d_TD.stride(0), *parts)

    def _sizes(self, qkv_TN: Tensor, out_TD: Tensor, at: Segments, lse_HT: Tensor) -> tuple[Any, ...]:
        h = self.heads
        parts = (*qkv_TN.split(h.widths, 1), qkv_TN.stride(0), at.starts, at.starts.numel() - 1)
        shape = (h.heads, h.kv, h.hd, h.hd**-0.5, h.window)
        return (*parts, *shape, out_TD, out_TD.stride(0), lse_HT, out_TD.shape[0], at.holes)


class TorchAttention:
    """The same in torch, any dtype. What its backward needs is torch's graph: (leaf, output)."""

    def __init__(self, heads: Heads) -> None:
        self.heads = heads

    def forward(
        self, qkv_TN: Tensor, out_TD: Tensor, at: Segments, lse_HT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        h = self.heads
        out_TD[at.n :] = 0
        with torch.enable_grad():
            leaf = qkv_TN[: at.n].detach().clone().requires_grad_()
            q, k, v = (part.view(1, at.n, -1, h.hd).transpose(1, 2) for part in leaf.split(h.widths, 1))
            seen = {"window": max(h.window, 0) or None, "causal": h.window != BOTH_WAYS, "prefixes": at.prefixes}
            o = segment_attention(q, k, v, at.bounds, **seen)[0].transpose(0, 1)
        out_TD[: at.n] = o.detach().reshape(at.n, -1)
        return leaf, o

    def backward(
        self, d_TD: Tensor, qkv_TN: Tensor, out_TD: Tensor, at: Segments, graph: tuple[Tensor, Tensor], to_TN: Tensor
    ) -> None:
        leaf, o = graph
        to_TN[at.n :] = 0
        (to_TN[: at.n],) = torch.autograd.grad(o, leaf, d_TD[: at.n].view_as(o))
