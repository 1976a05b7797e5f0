"""The policy as objectives see it: statistics only at supervised tokens, divergences, other dtypes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tunewright.core.example import Example, Group
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy
from tunewright.ops.logprob import DIVERGENCES, STATS
from tunewright.ops.packing import collate
from tunewright.ops.types import Batch


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Policy:
    return Policy(load_model(tiny_model_dir))


@pytest.fixture(scope="module")
def batch() -> Batch:
    rows = [([5, 6, 7, 8], [0, 0, 1, 0.5]), ([9], [1]), ([10, 11, 12], [0, 0, 0]), ([13, 14], [0, 2])]
    return collate([Group((Example(tuple(i), tuple(float(x) for x in w)),)) for i, w in rows])


def test_statistics_are_zero_where_nothing_is_supervised(policy: Policy, batch: Batch) -> None:
    stats = policy.token_stats(batch, set(STATS))
    assert set(stats) == set(STATS)
    for name, values in stats.items():
        assert values.shape == (10,) and values.dtype == torch.float32
        assert (values[batch.weights_T == 0] == 0).all(), name
    assert (stats["logp"][batch.weights_T > 0] < 0).all()
    assert (stats["entropy"][batch.weights_T > 0] > 0).all()


def test_statistics_are_those_of_the_whole_softmax(policy: Policy, batch: Batch) -> None:
    logits = policy.model(torch.tensor([[5, 6, 7, 8]])).logits[0].log_softmax(-1)
    stats = policy.token_stats(batch, {"logp"})
    torch.testing.assert_close(stats["logp"][1], logits[1, 7])
    torch.testing.assert_close(stats["logp"][2], logits[2, 8])


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergence_from_itself_is_zero_and_from_another_is_not(
    policy: Policy, batch: Batch, kind: str, tmp_path: Path
) -> None:
    import tiny

    other = Policy(load_model(tiny.build_tiny_model(tmp_path / "other", seed=1)))
    assert policy.divergence(batch, policy, kind).abs().max() < 1e-6
    apart = policy.divergence(batch, other, kind)
    assert (apart[batch.weights_T > 0] > 1e-3).all()
    assert (apart[batch.weights_T == 0] == 0).all()


def test_the_teacher_gets_no_gradient(batch: Batch, tiny_model_dir: Path, policy: Policy) -> None:
    student = Policy(load_model(tiny_model_dir))
    student.divergence(batch, policy, "forward_kl").sum().backward()
    assert all(p.grad is None for p in policy.model.parameters())
    assert any(p.grad is not None for p in student.model.parameters())


def test_a_batch_with_nothing_supervised_gives_zeros(policy: Policy) -> None:
    empty = collate([Group((Example((5, 6, 7), (0.0, 0.0, 0.0)),))])
    assert policy.token_stats(empty, {"logp"})["logp"].abs().sum() == 0


def test_bfloat16_agrees_by_top_1_and_divergence(policy: Policy, tiny_model_dir: Path) -> None:
    rows = [tuple((i * 31 + j * 7) % 470 for j in range(40)) for i in range(4)]
    batch = collate([Group((Example(r, (1.0,) * 40),)) for r in rows])
    half = Policy(load_model(tiny_model_dir, torch.bfloat16), torch.bfloat16)
    with torch.no_grad():
        assert policy.divergence(batch, half, "forward_kl").mean() < 5e-3
        a, b = policy.token_stats(batch, {"logp"})["logp"], half.token_stats(batch, {"logp"})["logp"]
    assert (a - b).abs().mean() < 0.1
