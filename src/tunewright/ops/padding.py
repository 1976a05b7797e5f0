"""Packed rows <-> a padded batch, for models whose attention cannot be told where a segment ends."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def places(lengths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """([T] row, [T] column) of each packed token in a batch padded on the right."""
    n = torch.tensor(lengths, device=device)
    row_T = torch.arange(len(lengths), device=device).repeat_interleave(n)
    start_S = torch.tensor([0, *accumulate(lengths)][:-1], device=device)
    return row_T, torch.arange(len(row_T), device=device) - start_S[row_T]


def pad(values_T: Tensor, lengths: Sequence[int]) -> Tensor:
    """[S, L, ...]: the segments of values_T [T, ...] as rows, 0 where there is no token."""
    out_SL = values_T.new_zeros(len(lengths), max(lengths), *values_T.shape[1:])
    return out_SL.index_put(places(lengths, values_T.device), values_T)


def real(lengths: Sequence[int], device: torch.device) -> Tensor:
    """[S, L] int64 attention mask: 1 where there is a token."""
    n_S = torch.tensor(lengths, device=device)
    return (torch.arange(max(lengths), device=device) < n_S[:, None]).long()


def unpad(values_SLD: Tensor, lengths: Sequence[int]) -> Tensor:
    """[T, D]: the rows' tokens end to end."""
    return values_SLD[places(lengths, values_SLD.device)]


def buckets(lengths: Sequence[Sequence[int]], waste: float = 0.2) -> list[list[int]]:
    """The segments in sets of similar length, so that at most `waste` of what is computed is padding.

    lengths: for each segment the length of each of its sides. Longest first; every segment is in exactly one set.
    """
    order = sorted(range(len(lengths)), key=lambda i: (sum(lengths[i]), i), reverse=True)
    found: list[list[int]] = []
    for i in order:
        if found and _padding([lengths[j] for j in (*found[-1], i)]) <= waste:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def _padding(lengths: Sequence[Sequence[int]]) -> float:
    """The share of a padded batch that is padding."""
    computed = sum(max(side) for side in zip(*lengths, strict=True)) * len(lengths)
    return 1 - sum(map(sum, lengths)) / computed
