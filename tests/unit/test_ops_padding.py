"""Packed rows to padded batches and back: nothing is lost, and little is padding."""

from __future__ import annotations

import random

import pytest
import torch

from tunewright.ops.padding import buckets, pad, real, unpad


def test_there_and_back() -> None:
    values = torch.arange(1, 8)
    rows = pad(values, [3, 1, 3])
    assert rows.tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 7]]
    assert real([3, 1, 3], values.device).tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 1]]
    assert unpad(rows[..., None], [3, 1, 3])[:, 0].tolist() == values.tolist()
    assert pad(values[:, None] * torch.ones(1, 2), [3, 1, 3]).shape == (3, 3, 2)


def test_gradients_pass_through() -> None:
    values = torch.randn(7, 2, requires_grad=True)
    (unpad(pad(values, [3, 1, 3]) * 2, [3, 1, 3]) ** 2).sum().backward()
    torch.testing.assert_close(values.grad, 8 * values.detach())


@pytest.mark.parametrize("sides", [1, 2])
def test_sets_hold_every_segment_once_with_little_padding(sides: int) -> None:
    rng = random.Random(0)
    lengths = [tuple(rng.randint(1, 60) for _ in range(sides)) for _ in range(40)]
    found = buckets(lengths, waste=0.2)
    assert sorted(i for rows in found for i in rows) == list(range(40))
    for rows in found:
        computed = len(rows) * sum(max(lengths[i][k] for i in rows) for k in range(sides))
        assert sum(sum(lengths[i]) for i in rows) >= 0.8 * computed
    assert len(buckets([(7,)] * 9)) == 1
