"""Label smoothing is torch's, in loss and gradient, and costs nothing where it is off."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from tunewright.core.example import Example, Group
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy, head_of
from tunewright.objectives.sft import SFT
from tunewright.ops.packing import pack
from tunewright.ops.types import Batch


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Policy:
    return Policy(load_model(tiny_model_dir))


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    rng = random.Random(0)
    groups = []
    for i in range(5):
        n = rng.randint(5, 12)
        weights = tuple(0.0 if k < 3 else rng.choice([1.0, 0.5]) for k in range(n))
        groups.append(Group((Example(tuple(rng.randrange(470) for _ in range(n)), weights, i + 1),)))
    return pack(groups, 30)


def step(policy: Policy, batches: list[Batch], objective: SFT) -> tuple[float, Tensor]:
    policy.model.zero_grad()
    weight = sum(objective.weights(b)["loss"] for b in batches)
    loss = sum(objective(policy, b)["loss"].total for b in batches) / weight  # type: ignore[union-attr]
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("e", [0.0, 0.1, 0.5])
def test_label_smoothing_is_that_of_torch(policy: Policy, batches: list[Batch], e: float) -> None:
    loss, grad = step(policy, batches, SFT(SFT.Options(label_smoothing=e)))
    policy.model.zero_grad()
    total, weight = torch.zeros(()), 0.0
    for b in batches:
        logits_TV = head_of(policy.model).logits(policy.hidden(b))
        each_T = F.cross_entropy(logits_TV, b.targets_T, reduction="none", label_smoothing=e)
        total, weight = total + (each_T * b.weights_T).sum(), weight + b.weights_T.sum().item()
    (total / weight).backward()
    expected = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
    assert loss == pytest.approx((total / weight).item(), rel=1e-5)
    assert (grad - expected).norm() <= 1e-5 * expected.norm()


def test_without_smoothing_no_mean_is_asked_for(policy: Policy, batches: list[Batch]) -> None:
    """mean_logp would take the slower pass through the head."""

    class Asked:
        want: set[str]

        def token_stats(self, batch: Batch, want: set[str]) -> dict[str, Tensor]:
            self.want = want
            return policy.token_stats(batch, want)

    asked = Asked()
    SFT(SFT.Options())(asked, batches[0])  # type: ignore[arg-type]
    assert asked.want == {"logp", "correct"}


@pytest.mark.parametrize("e", [-0.1, 1.0])
def test_a_smoothing_out_of_range_is_refused(e: float) -> None:
    with pytest.raises(ValidationError):
        SFT.Options(label_smoothing=e)
