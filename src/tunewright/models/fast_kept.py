"""What the fast path of Llama-shaped models passes from the forward to the backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tunewright.models.fast_attention import Segments
from tunewright.ops.lora import padded


@dataclass(frozen=True)
class Prefix:
    """Keys and values that stand before the rows' own: rows at_V of the pack, V = rows x N, are only there for them.

    layers_LNC: [layers, N, columns of keys and values].
    """

    at_V: Tensor
    layers_LNC: Tensor

    def put(self, layer: int, qkv_TN: Tensor) -> None:
        """Let these rows have its keys and values."""
        given_NC = self.layers_LNC[layer].to(qkv_TN.dtype)
        n, columns = given_NC.shape
        qkv_TN[self.at_V, qkv_TN.shape[1] - columns :] = given_NC.repeat(len(self.at_V) // n, 1)

    def take(self, dqkv_TN: Tensor) -> Tensor:
        """[N, C] float32: their gradient, of all rows together, which goes no further."""
        n, columns = self.layers_LNC.shape[1:]
        found_VC = dqkv_TN[self.at_V, dqkv_TN.shape[1] - columns :].float()
        dqkv_TN[self.at_V] = 0
        return found_VC.view(-1, n, columns).sum(0)


@dataclass(frozen=True)
class Packed:
    """A batch for the kernels: tokens padded to whole blocks (n of them real), where segments lie, cosine and sine
    [T, hd/2]. inputs: [n, D] embeddings of the tokens where a soft prompt is among them, else None.
    below: whether something below the layers is trained. record: the same as a struct of C (layer.h, Pack).
    """

    tokens_T: Tensor
    inputs: Tensor | None
    below: bool
    at: Segments
    cosine: Tensor
    sine: Tensor
    record: Tensor
    prefix: Prefix | None = None

    @property
    def n(self) -> int:
        return self.at.n

    @property
    def total(self) -> int:
        return self.tokens_T.shape[0]


@dataclass(frozen=True)
class Kept:
    """What the backward of a layer needs of its forward; only x is kept when the layer is computed again.

    What the norms made of x and mid is always made again: writing it to memory and reading it there takes as long.

    small: [2 + heads, T] float32, 1/rms of both norms and the log-sum-exp. seen: what attention keeps for its backward.
    low: [T, r] of each product's update, narrow results, in the order of Layer.linears. alone: what o and down add to
    the residual, where they have gains or bottlenecks. narrow: the bottlenecks' values before their f. room: all but x
    and small where the layer is one call of the kernels. rows: where only some tokens' outputs are wanted, these;
    chosen: their x and what they attended to, and all behind the attention is theirs alone.
    """

    x: Tensor
    small: Tensor | None = None
    room: Tensor | None = None
    low: tuple[Tensor, ...] = ()
    qkv: Tensor | None = None
    attended: Tensor | None = None
    seen: Any = None
    mid: Tensor | None = None
    gu: Tensor | None = None
    alone: Sequence[Tensor | None] = (None, None)
    narrow: Sequence[Tensor | None] = (None, None, None)
    rows: Tensor | None = None
    chosen: tuple[Tensor, Tensor] | None = None


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], with rows of zeros up to whole blocks."""
    return F.pad(x[rows], (0, 0, 0, padded(rows.numel()) - rows.numel()))


def spread_rows(x: Tensor, rows: Tensor, n: int) -> Tensor:
    """What take_rows took, at its place in n rows of zeros."""
    return x.new_zeros(n, x.shape[1]).index_copy_(0, rows, x[: rows.numel()])


def if_given(room: Tensor | None) -> tuple[Tensor, ...]:
    return () if room is None else (room,)
