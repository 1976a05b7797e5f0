"""A step's packed row, told to those who compute it: whose its tokens are, and which adapter they use."""

from __future__ import annotations

import torch
from torch import Tensor

from tunewright.engine.attention import Chunk, Singles, StepPlan
from tunewright.engine.scheduler import Sequence


def route(work: list[tuple[Sequence, int]], first: dict[Sequence, int]) -> list[tuple[str, Tensor | None]]:
    """Which rows belong to which adapter; None when all rows are one adapter's."""
    rows: dict[str, list[int]] = {}
    for s, n in work:
        rows.setdefault(s.target.adapter_key, []).extend(range(first[s], first[s] + n))
    if len(rows) == 1:
        return [(key, None) for key in rows if key]
    return [(key, torch.tensor(at)) for key, at in rows.items() if key]


def plan_of(work: list[tuple[Sequence, int]], first: dict[Sequence, int], device: torch.device) -> StepPlan:
    """Whose the row's tokens are, for the attention."""
    chunks = [Chunk(s.place, first[s], first[s] + n, s.place.length) for s, n in work if n > 1]
    by_pool: dict[int, list[Sequence]] = {}
    for s, n in work:
        if n == 1:
            by_pool.setdefault(id(s.place.pool), []).append(s)
    singles = []
    for members in by_pool.values():
        places = [(s.place.slot, first[s], s.place.length) for s in members]
        pool = members[0].place.pool
        rows_N = torch.zeros(len(pool.owners), dtype=torch.long)
        at_N = torch.zeros_like(rows_N)
        for slot, row, at in places:
            rows_N[slot], at_N[slot] = row, at
        slots_B = torch.tensor(sorted(slot for slot, _, _ in places), device=device)
        singles.append(Singles(pool, rows_N.to(device), at_N.to(device), slots_B, max(at for _, _, at in places) + 1))
    return StepPlan(singles, chunks)
