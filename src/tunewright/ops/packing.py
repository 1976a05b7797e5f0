"""Groups -> Batch: segments laid end to end in one row, without padding; targets never cross a segment."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from tunewright.core.example import Example, Group
from tunewright.ops.extras import extras
from tunewright.ops.prefix import is_shared, share_prefixes
from tunewright.ops.types import Batch


def collate(groups: Sequence[Group]) -> Batch:
    """One Batch of all groups, in the given order. Raises ValueError if there is none or an example is empty."""
    examples = [e for g in groups for e in g.examples]
    if not examples or not all(e.ids for e in examples):
        raise ValueError("a batch needs at least one group, and every example at least one token")
    lengths = [len(e.ids) for e in examples]
    ends = list(accumulate(lengths))
    return Batch(
        tokens_T=torch.tensor([t for e in examples for t in e.ids], dtype=torch.int64),
        targets_T=torch.tensor([t for e in examples for t in (*e.ids[1:], 0)], dtype=torch.int64),
        weights_T=torch.tensor([w for e in examples for w in _target_weights(e)], dtype=torch.float32),
        position_T=torch.tensor([p for n in lengths for p in range(n)], dtype=torch.int64),
        cu_seqlens=torch.tensor([0, *ends], dtype=torch.int32),
        parent_S=torch.full((len(examples),), -1, dtype=torch.int64),
        group_S=torch.tensor([i for i, g in enumerate(groups) for _ in g.examples], dtype=torch.int64),
        last_S=torch.tensor(ends, dtype=torch.int64) - 1,
        source_S=torch.tensor([e.source for e in examples], dtype=torch.int64),
        **extras(examples),
    )


def _target_weights(example: Example) -> tuple[float, ...]:
    """Weight of what each position predicts: the next token's, and 0 at the end."""
    return (*example.weights[1:], 0.0)


def pack(groups: Sequence[Group], micro_batch_tokens: int, virtual: int = 0, share: bool = False) -> list[Batch]:
    """The groups of one step as micro-batches of at most micro_batch_tokens tokens each.

    virtual: tokens that will be put in front of each example; they count.
    share: the prompt of a group's examples is computed once (ops/prefix.py); it counts as often as it would otherwise,
        so the same groups go together either way.
    Best fit of the groups from the largest down (11/9 of the least number of micro-batches at worst; Johnson 1974); the
    same groups always give the same batches. A group is never split: one larger than the budget gets its own batch.
    """
    bins: list[list[Group]] = []
    room: list[int] = []
    for n, group in sorted(((g.n_tokens + virtual * len(g.examples), g) for g in groups), key=lambda pair: -pair[0]):
        fits = min((i for i, free in enumerate(room) if n <= free), key=room.__getitem__, default=None)
        if fits is None:
            bins.append([group])
            room.append(micro_batch_tokens - n)
        else:
            bins[fits].append(group)
            room[fits] -= n
    return [share_prefixes(b) if share and any(is_shared(g) for g in b) else collate(b) for b in bins]
