"""Soft prompts in a packed row: virtual tokens in front of every segment, or keys and values that it sees before its
own.

A segment that continues another one gets no rows of its own: it sees its parent's. Statistics stay those of the batch
as it was: the places of its tokens in the longer row come with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tunewright.ops.types import Batch

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Virtual:
    """N virtual tokens in front of each segment: rows or layers. Positions of the real tokens begin after them.

    rows_ND: their embeddings. layers: for each layer their keys and values, each [1, H, N, K] (of a layer with a window
    perhaps only the last ones, which it can see).
    """

    n: int
    rows_ND: Tensor | None = None
    layers: tuple[KeysValues, ...] | None = None


def insert_rows(batch: Batch, rows_ND: Tensor, tokens_TD: Tensor) -> tuple[Batch, Tensor, Tensor]:
    """(the batch with N virtual tokens in front of each segment without parent, [R, D] its embeddings, [T] the places
    in it of the batch's own tokens).

    tokens_TD: embeddings of the batch's own tokens. A virtual token has id, target, weight, noise key and type 0.
    """
    n, device = rows_ND.shape[0], batch.tokens_T.device
    lengths_S = batch.cu_seqlens.diff().long()
    more_S = n * (batch.parent_S < 0).long()
    at_T = torch.arange(batch.n_tokens, device=device) + more_S.cumsum(0).repeat_interleave(lengths_S)
    total = batch.n_tokens + int(more_S.sum())
    at_V = others(at_T, total)
    virtual_V = torch.arange(n, device=device).repeat(at_V.numel() // max(n, 1))

    def spread(values_T: Tensor | None) -> Tensor | None:
        return None if values_T is None else values_T.new_zeros(total).index_copy_(0, at_T, values_T)

    def numbered(values_T: Tensor) -> Tensor:
        return values_T.new_zeros(total).index_copy_(0, at_T, values_T + n).index_copy_(0, at_V, virtual_V)

    source_R = numbered(torch.arange(batch.n_tokens, device=device))
    ends_S = (lengths_S + more_S).cumsum(0)
    grown = replace(
        batch,
        **{k: spread(getattr(batch, k)) for k in ("tokens_T", "targets_T", "weights_T", "noise_T", "types_T")},
        position_T=numbered(batch.position_T),
        cu_seqlens=torch.cat([ends_S.new_zeros(1), ends_S]).to(batch.cu_seqlens.dtype),
        last_S=at_T[batch.last_S],
    )
    return grown, torch.cat([rows_ND.to(tokens_TD.dtype), tokens_TD]).index_select(0, source_R), at_T


def others(at_T: Tensor, total: int) -> Tensor:
    """[V] the places of `total` that are not among at_T, ascending: those of the virtual tokens."""
    return torch.ones(total, dtype=torch.bool, device=at_T.device).index_fill_(0, at_T, False).nonzero()[:, 0]


def side_by_side(virtual: Virtual) -> Tensor | None:
    """[layers, N, 2 Hkv K] keys and values as the columns of one matrix; None where there are none."""
    if virtual.layers is None:
        return None
    pairs = (torch.cat([keys, values], 1)[0] for keys, values in virtual.layers)
    return torch.stack([x.transpose(0, 1).flatten(1) for x in pairs])
