"""Packing: nothing is lost, split, reordered within a batch or predicted across a segment's end."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tunewright.core.example import Example, Group
from tunewright.ops.packing import collate, pack


def group(*lengths: int, start: int = 0) -> Group:
    return Group(tuple(Example(tuple(range(start, start + n)), tuple(float(i) for i in range(n)), 7) for n in lengths))


def test_collate_lays_segments_end_to_end() -> None:
    batch = collate([group(3, start=10), group(2, 1, start=20)])
    assert batch.tokens_T.tolist() == [10, 11, 12, 20, 21, 20]
    assert batch.targets_T.tolist() == [11, 12, 0, 21, 0, 0]
    assert batch.weights_T.tolist() == [1.0, 2.0, 0.0, 1.0, 0.0, 0.0]
    assert batch.position_T.tolist() == [0, 1, 2, 0, 1, 0]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.last_S.tolist() == [2, 4, 5]
    assert batch.group_S.tolist() == [0, 1, 1]
    assert batch.parent_S.tolist() == [-1, -1, -1]
    assert batch.source_S.tolist() == [7, 7, 7]
    assert (batch.n_tokens, batch.n_segments, batch.n_groups) == (6, 3, 2)


def test_pack_is_best_fit_from_the_largest_down() -> None:
    """First fit would put the 3 beside the 6; the order of the groups does not matter to the sizes."""
    groups = [group(n, start=100 * n) for n in (2, 5, 3, 6, 4)]
    batches = pack(groups, 10)
    assert [torch.diff(b.cu_seqlens).tolist() for b in batches] == [[6, 4], [5, 3, 2]]
    assert [torch.diff(b.cu_seqlens).tolist() for b in pack([group(n) for n in (6, 7, 3)], 10)] == [[7, 3], [6]]
    assert [b.tokens_T.tolist() for b in pack(groups, 10)] == [b.tokens_T.tolist() for b in batches]


def test_a_group_is_never_split_and_a_large_one_stands_alone() -> None:
    batches = pack([group(4, 4), group(9, 9), group(2)], 10)
    assert [torch.diff(b.cu_seqlens).tolist() for b in batches] == [[9, 9], [4, 4, 2]]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("size", [2, 6])
def test_a_pair_or_the_answers_to_a_prompt_are_in_one_batch_at_any_budget(size: int, share: bool) -> None:
    """Also where the answers alone would fit elsewhere, and where their prompt is computed once."""

    def rolled(number: int) -> Group:
        ids = [tuple(range(5 + number + i)) for i in range(size)]
        made = (Example(x, (0.0,) * 4 + (1.0,) * (len(x) - 4), number) for x in ids)
        return Group(tuple(made), prefix=4)

    groups = [rolled(n) for n in range(5)]
    for budget in (1, 9, 20, 60, 10**6):
        batches = pack(groups, budget, share=share)
        held = [Counter(b.source_S.tolist()) for b in batches]
        assert sum(held, Counter()) == dict.fromkeys(range(5), size + share)
        assert all(n == size + share for counts in held for n in counts.values()), budget
    assert len(pack(groups, 1, share=share)) == 5 and len(pack(groups, 10**6, share=share)) == 1


@pytest.mark.parametrize("groups", [[], [Group((Example((), ()),))]])
def test_nothing_to_collate_is_an_error(groups: list[Group]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        collate(groups)


def test_batch_moves_to_a_device_with_all_its_tensors() -> None:
    moved = collate([group(3)]).to("meta")
    assert moved.tokens_T.device.type == moved.cu_seqlens.device.type == "meta"
