"""Groups written and read back are the same groups, by index, slice and size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tunewright.core.example import Example, Group
from tunewright.data.rendered import StoredGroups, sizes, write_groups

GROUPS = [
    Group((Example((1, 2, 3), (0.0, 1.0, 1.0), 1),)),
    Group((Example((7,), (0.0,), 2), Example((9, 2**31 - 1, 4, 5), (0.0, 0.5, 0.0, 2.0), 2)), prefix=1),
    Group((Example(tuple(range(5000)), (0.0,) * 4000 + (1.0,) * 1000, 2_000_000),)),
]


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    assert write_groups(tmp_path, iter(GROUPS)) == 3
    stored = StoredGroups(tmp_path)
    assert list(stored) == GROUPS
    assert stored[-1] == GROUPS[-1] and stored[1:] == GROUPS[1:] and len(stored) == 3
    with pytest.raises(IndexError, match="3 groups"):
        stored[3]


def test_sizes_are_known_without_reading(tmp_path: Path) -> None:
    write_groups(tmp_path, GROUPS)
    expected = [[3, 9, 2], [5, 17, 2], [5000, 25_000_000, 1000]]
    assert StoredGroups(tmp_path).sizes.tolist() == expected
    assert sizes(GROUPS).tolist() == expected


def test_no_groups_are_no_error(tmp_path: Path) -> None:
    assert write_groups(tmp_path, []) == 0
    assert list(StoredGroups(tmp_path)) == []
    assert sizes([]).shape == (0, 3)


def test_weights_are_exact_in_single_precision(tmp_path: Path) -> None:
    weights = tuple(float(np.float32(w)) for w in np.random.default_rng(0).random(50))
    write_groups(tmp_path, [Group((Example(tuple(range(50)), weights),))])
    assert StoredGroups(tmp_path)[0].examples[0].weights == weights
