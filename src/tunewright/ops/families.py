"""Segments that continue one prompt, as a kernel sees them: one longer segment in which sisters do not see each other.

The prompt and its answers lie behind each other. A token of an answer sees the prompt's first tokens and its own
answer; what lies between the two, the end of the prompt and the answers before its own, is a hole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunewright.ops.attention import prefixes_of
from tunewright.ops.types import Batch


def families(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """([F+1] int64 cumulative lengths of the families, [T, 2] int64 the hole [from, to) of each token, counted from the
    first token of its family; None where no segment continues another).

    Raises ValueError if an answer does not lie directly behind its prompt or another of its answers.
    """
    ends = batch.cu_seqlens.long()
    prefixes = prefixes_of(batch)
    if prefixes is None:
        return ends, None
    starts, found, rows = ends.tolist(), [0], []
    root = -1
    for i, (parent, n) in enumerate(prefixes):
        if parent < 0:
            root = i
            found.append(starts[i + 1])
        elif parent != root:
            raise ValueError(f"segment {i} does not lie behind segment {parent}, which it continues")
        else:
            found[-1] = starts[i + 1]
        hole = (n, starts[i] - starts[root]) if parent >= 0 else (0, 0)
        rows.append(hole)
    holes = torch.tensor(rows).repeat_interleave(ends.diff(), dim=0)
    return torch.tensor(found), holes.contiguous()
