"""The law of every objective in the table: only the loop divides, so a step gives the same however it is cut."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import groups_for, head_for, instance
from pydantic import ValidationError
from torch import Tensor

import tiny
from tunewright.core.conversation import Shape
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy
from tunewright.objectives import OBJECTIVES
from tunewright.ops.packing import pack
from tunewright.train.reference import Reference
from tunewright.train.value import ValueHead

pytestmark = pytest.mark.parametrize("name", list(OBJECTIVES))
Step = tuple[dict[str, float], dict[str, Tensor]]


@pytest.fixture
def policy(name: str, tiny_model_dir: Path) -> Policy:
    return Policy(load_model(tiny_model_dir, head=head_for(OBJECTIVES.load(name).card)))


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Another model than the policy, so that there is something to compare with, and rewards are not 0."""
    return Reference(Policy(load_model(tiny.build_tiny_model(tmp_path_factory.mktemp("reference"), seed=1))))


def objective_of(name: str, reference: Reference) -> Any:
    objective = instance(OBJECTIVES, name)
    if objective.card.needs_reference:
        objective.reference = reference
    if "teacher" in objective.card.required:
        objective.teacher = reference
    if hasattr(objective, "value_head"):
        objective.value_head = ValueHead(64, torch.device("cpu"))
    return objective


def step(
    objective: Any, policy: Policy, micro_batch_tokens: int, order: list[int] | None = None, share: bool = False
) -> Step:
    """({term: total / weight}, {parameter: gradient}) of one step, divided by weights known before the forward."""
    groups = groups_for(objective.card)
    batches = pack([groups[i] for i in order or range(len(groups))], micro_batch_tokens, share=share)
    stats = getattr(objective, "stats", None)
    seen = None if stats is None else stats(policy, batches)
    weights = {k: sum(objective.weights(b)[k] for b in batches) for k in objective.weights(batches[0])}
    policy.model.zero_grad()
    values = dict.fromkeys(weights, 0.0)
    for batch in batches:
        terms = objective(policy, batch, seen)
        assert {k: t.weight for k, t in terms.items()} == pytest.approx(objective.weights(batch))
        for k, t in terms.items():
            values[k] += t.total.item() / weights[k]
        sum(t.coef * t.total / weights[k] for k, t in terms.items() if t.coef).backward()  # type: ignore[union-attr]
    return values, {k: p.grad.clone() for k, p in policy.model.named_parameters() if p.grad is not None}


def assert_same(a: Step, b: Step) -> None:
    assert a[0] == pytest.approx(b[0], rel=1e-5, abs=1e-6)
    assert set(a[1]) == set(b[1]) != set()
    for k, grad in a[1].items():
        assert (grad - b[1][k]).norm() <= 1e-5 * b[1][k].norm() + 1e-8, k


@pytest.mark.parametrize("micro_batch_tokens", [1, 25, 40])
def test_any_cut_of_a_step_is_the_whole_step(
    name: str, micro_batch_tokens: int, policy: Policy, reference: Reference
) -> None:
    objective = objective_of(name, reference)
    whole, cut = step(objective, policy, 10**6), step(objective, policy, micro_batch_tokens)
    assert_same(cut, whole)
    assert any(g.abs().max() > 0 for g in whole[1].values())


@pytest.mark.parametrize("micro_batch_tokens", [25, 10**6])
def test_a_shared_prompt_is_the_same_as_one_for_each(
    name: str, micro_batch_tokens: int, policy: Policy, reference: Reference
) -> None:
    objective = objective_of(name, reference)
    shared = pack(groups_for(objective.card), micro_batch_tokens, share=True)
    assert any((b.parent_S >= 0).any() for b in shared) == (objective.card.group_size != 1)
    assert_same(step(objective, policy, micro_batch_tokens, share=True), step(objective, policy, 10**6))


def test_the_order_of_groups_does_not_matter(name: str, policy: Policy, reference: Reference) -> None:
    objective = objective_of(name, reference)
    assert_same(step(objective, policy, 30, order=[4, 2, 0, 5, 3, 1]), step(objective, policy, 10**6))


def test_the_same_step_twice_gives_the_same_bits(name: str, policy: Policy, reference: Reference) -> None:
    objective = objective_of(name, reference)
    a, b = step(objective, policy, 30), step(objective, policy, 30)
    assert a[0] == b[0]
    assert all(torch.equal(a[1][k], b[1][k]) for k in b[1])


def test_terms_are_finite_scalars_and_metrics_carry_no_gradient(
    name: str, policy: Policy, reference: Reference
) -> None:
    objective = objective_of(name, reference)
    (batch,) = pack(groups_for(objective.card), 10**6)
    terms = objective(policy, batch)
    assert "loss" in terms
    assert any(t.coef != 0 and t.total.requires_grad for t in terms.values())
    for term in terms.values():
        assert term.total.shape == ()
        assert math.isfinite(term.total.item()) and term.weight > 0
        assert term.coef != 0 or not term.total.requires_grad


def test_unsupervised_tokens_do_not_matter(name: str, policy: Policy, reference: Reference) -> None:
    """A group that trains nothing adds nothing."""
    objective = objective_of(name, reference)
    (batch,) = pack(groups_for(objective.card, n=1), 10**6)
    batch.weights_T.zero_()
    for name in {"label", "labels"} & set(batch.per_segment):
        batch.per_segment[name].fill_(math.nan)
    policy.model.zero_grad()
    terms = objective(policy, batch)
    assert all(t.weight == 0 and t.total.item() == 0 for t in terms.values())
    sum(t.coef * t.total for t in terms.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None or not p.grad.any() for p in policy.model.parameters())


def test_a_few_steps_lower_the_loss(name: str, tiny_model_dir: Path, reference: Reference) -> None:
    objective = objective_of(name, reference)
    policy = Policy(load_model(tiny_model_dir, head=head_for(OBJECTIVES.load(name).card)))
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        losses.append(step(objective, policy, 10**6)[0]["loss"])
        optimizer.step()
    assert losses[-1] < losses[0]


def test_options_and_card(name: str) -> None:
    part = OBJECTIVES.load(name)
    json.dumps(part.Options.model_json_schema())
    json.dumps(part.Options().model_dump())
    with pytest.raises(ValidationError):
        part.Options(no_such_option=1)
    assert part.card.title and part.card.shapes
    assert set(part.card.shapes) <= set(Shape.__args__)  # type: ignore[attr-defined]
    assert part.card.openai_method in (None, "supervised", "dpo", "reinforcement")
    assert part.__doc__
