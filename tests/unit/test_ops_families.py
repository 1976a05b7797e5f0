"""A prompt and its answers as one segment with holes: who sees whom is what the segments say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tunewright.core.example import Example, Group
from tunewright.ops.families import families
from tunewright.ops.packing import collate, pack
from tunewright.ops.types import Batch


def group(prompt: int, answers: list[int], source: int) -> Group:
    examples = [
        Example((*range(prompt), *[100 * i + k for k in range(n)]), (0.0,) * prompt + (1.0,) * n, source)
        for i, n in enumerate(answers, 1)
    ]
    return Group(tuple(examples), prompt)


def seen_by_segments(batch: Batch) -> torch.Tensor:
    """[T, T] from parent_S alone."""
    ends, parents = batch.cu_seqlens.tolist(), batch.parent_S.tolist()
    seen = torch.zeros(batch.n_tokens, batch.n_tokens, dtype=torch.bool)
    for s, parent in enumerate(parents):
        for q in range(ends[s], ends[s + 1]):
            seen[q, ends[s] : q + 1] = True
            if parent >= 0:
                seen[q, ends[parent] : ends[parent] + int(batch.position_T[ends[s]])] = True
    return seen


def test_who_sees_whom() -> None:
    groups = [group(5, [3, 4], 1), group(2, [6], 2), group(4, [1, 2, 3], 3), group(1, [2, 2], 4)]
    (batch,) = pack(groups, 10**6, share=True)
    starts, holes = families(batch)
    assert holes is not None and holes.dtype == starts.dtype == torch.int64
    assert len(starts) - 1 == 5  # two prompts with their answers, a single row, a pair that shares nothing
    seen = torch.zeros(batch.n_tokens, batch.n_tokens, dtype=torch.bool)
    for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        for q in range(a, b):
            seen[q, a : q + 1] = True
            seen[q, a + int(holes[q, 0]) : a + int(holes[q, 1])] = False
    assert torch.equal(seen, seen_by_segments(batch))


def test_rows_that_share_nothing_have_no_holes() -> None:
    batch = collate([group(5, [3, 4], 1)])
    starts, holes = families(batch)
    assert holes is None and starts.tolist() == batch.cu_seqlens.tolist()


def test_an_answer_away_from_its_prompt_is_an_error() -> None:
    (batch,) = pack([group(5, [3, 4], 1), group(5, [3, 4], 2)], 10**6, share=True)
    parents = batch.parent_S.clone()
    parents[4] = 0
    with pytest.raises(ValueError, match="does not lie behind"):
        families(replace(batch, parent_S=parents))
