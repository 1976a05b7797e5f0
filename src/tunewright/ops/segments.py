"""From values per token to values per example: sums over segments, whatever else the batch shares or packs."""

from __future__ import annotations

import torch
from torch import Tensor

from tunewright.ops.types import Batch


def sums(values_T: Tensor, batch: Batch) -> Tensor:
    """[S] float64: the sum of the values over each segment. A segment's sum does not depend on what else is packed."""
    return torch.segment_reduce(values_T.double(), "sum", lengths=batch.cu_seqlens.diff().long(), initial=0.0)


def examples(batch: Batch) -> Tensor:
    """[N] int64: the segments that are examples, in order. Those that only hold a shared prompt are left out."""
    number_S = batch.per_segment.get("example")
    if number_S is None:
        return torch.arange(batch.n_segments, device=batch.parent_S.device)
    return (number_S >= 0).nonzero()[:, 0]


def places(batch: Batch) -> Tensor:
    """[N] int64: each example's place in its group, from 0; the examples of examples()."""
    group_N = batch.group_S[examples(batch)]
    return torch.arange(len(group_N), device=group_N.device) - torch.searchsorted(group_N, group_N)


def pairs(batch: Batch) -> Tensor:
    """[P, 2] int64: the segments of each group's two examples, the preferred one first.

    Raises ValueError if a group has another number of examples.
    """
    rows_N = examples(batch)
    group_N = batch.group_S[rows_N]
    if len(rows_N) != 2 * batch.n_groups or not torch.equal(group_N[0::2], group_N[1::2]):
        raise ValueError("every group must have two examples, the preferred and the rejected one")
    return rows_N.view(-1, 2)
