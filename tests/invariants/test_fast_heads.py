"""Heads for whole rows on the fast path: the scores and gradients are those of the plain modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain import assert_relative, fast, take_gradients
from torch import Tensor, nn

import tiny
from tunewright.core.example import Example, Group
from tunewright.models.heads import Head
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy
from tunewright.ops.kernels import Kernels
from tunewright.ops.packing import collate
from tunewright.tuners import TUNERS

LENGTHS = (9, 40, 3, 21)


def rows() -> list[Group]:
    return [Group((Example(tuple((7 * i + 5 * k) % 90 + 3 for k in range(n)), (0.0,) * n, i),))
            for i, n in enumerate(LENGTHS)]  # fmt: skip


def scored(folder: Path, tuner: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with two outputs a row, and a tuner that is not where it starts."""
    kind: Any = TUNERS.load(tuner)
    made = kind(kind.Options())
    model = made.attach(load_model(folder, dtype, Head("regress", ("a", "b"), 3)), 0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in made.trainable().values():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return model


def score(policy: Policy, groups: list[Group]) -> tuple[Tensor, dict[str, Tensor]]:
    """([S, 2], gradients by name of their squares' sum)."""
    said = policy.scores(collate(groups))
    said.square().sum().backward()
    return said.detach(), take_gradients(policy.model)


@pytest.mark.parametrize("tuner", ["lora", "full", "dora"])
def test_scores_and_gradients_are_those_of_the_plain_modules(
    tiny_model_dir: Path, kernels: Kernels, tuner: str
) -> None:
    want, theirs = score(Policy(scored(tiny_model_dir, tuner)), rows())
    got, ours = score(fast(scored(tiny_model_dir, tuner), kernels), rows())
    assert torch.allclose(got, want, atol=1e-5) and want.abs().min() > 1e-3
    assert any("score" in name for name in ours) and any("q_proj" in name for name in ours)
    assert_relative(ours, theirs, 1e-4)


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_on_tiles_it_is_near_float32(tmp_path: Path, kernels: Kernels, tuner: str) -> None:
    if not kernels.tiles:
        pytest.skip("this processor has no AMX tiles")
    folder = tiny.build_tiny_model(tmp_path / "tiled", **tiny.TILED)
    want, theirs = score(Policy(scored(folder, tuner)), rows())
    got, ours = score(fast(scored(folder, tuner), kernels, torch.bfloat16), rows())
    assert (got - want).norm() <= 0.03 * want.norm()
    size = sum(float(g.square().sum()) for g in theirs.values())
    assert sum(float((ours[k] - theirs[k]).square().sum()) for k in theirs) <= 0.05**2 * size
