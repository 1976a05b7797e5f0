"""The losses over preferences are their papers' formulas, written out in float64 over whole logits; so are the
gradients, down to finite differences over 20 tokens."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import instance
from torch import Tensor, nn

import tiny
from tunewright.core.example import Example, Group
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy
from tunewright.objectives import OBJECTIVES
from tunewright.objectives.kto import mismatched
from tunewright.objectives.orpo import log_1m_exp
from tunewright.ops.packing import pack
from tunewright.ops.types import Batch
from tunewright.train.reference import Reference

Logps = list[list[float]]
VOCAB = 470


def pairs(n: int = 5, members: int = 2) -> list[Group]:
    """Groups of `members` answers to a prompt, every token of an answer with weight 1."""
    rng = random.Random(3)
    made = []
    for i in range(n):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(2, 6))]
        examples = []
        for _ in range(members):
            answer = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))]
            weights = (0.0,) * len(prompt) + (1.0,) * len(answer)
            examples.append(Example((*prompt, *answer), weights, source=i + 1))
        made.append(Group(tuple(examples), prefix=len(prompt)))
    return made


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def dpo(w: Tensor, l: Tensor, rw: Tensor, rl: Tensor, nw: int, nl: int, beta: float = 0.1, e: float = 0.0) -> Tensor:  # noqa: E741
    p = sigmoid(beta * ((w - rw) - (l - rl)))
    return -(1 - e) * torch.log(p) - e * torch.log(1 - p)


def ipo(w: Tensor, l: Tensor, rw: Tensor, rl: Tensor, nw: int, nl: int, tau: float = 0.1) -> Tensor:  # noqa: E741
    return ((w - rw) / nw - (l - rl) / nl - 1 / (2 * tau)) ** 2


def orpo(w: Tensor, l: Tensor, rw: Tensor, rl: Tensor, nw: int, nl: int, lam: float = 0.1) -> Tensor:  # noqa: E741
    pw, pl = torch.exp(w / nw), torch.exp(l / nl)
    return -w / nw - lam * torch.log(sigmoid(torch.log((pw / (1 - pw)) / (pl / (1 - pl)))))


def simpo(w: Tensor, l: Tensor, rw: Tensor, rl: Tensor, nw: int, nl: int) -> Tensor:  # noqa: E741
    return -torch.log(sigmoid(2.0 / nw * w - 2.0 / nl * l - 1.0))


def cpo(w: Tensor, l: Tensor, rw: Tensor, rl: Tensor, nw: int, nl: int) -> Tensor:  # noqa: E741
    return -torch.log(sigmoid(0.1 * w - 0.1 * l)) - w / nw


FORMULAS: dict[str, tuple[str, dict[str, Any], Callable[..., Tensor]]] = {
    "dpo": ("dpo", {}, dpo),
    "dpo, other options": ("dpo", {"beta": 0.5, "label_smoothing": 0.2}, lambda *a: dpo(*a, beta=0.5, e=0.2)),
    "ipo": ("dpo", {"loss": "ipo"}, ipo),
    "orpo": ("orpo", {}, orpo),
    "simpo": ("simpo", {}, simpo),
    "cpo": ("cpo", {}, cpo),
}


@pytest.fixture(scope="module")
def models(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, nn.Module]:
    """A policy and a reference in float64."""
    other = tiny.build_tiny_model(tmp_path_factory.mktemp("reference"), seed=1)
    return load_model(tiny_model_dir).double(), load_model(other).double()


def objective_of(name: str, options: dict[str, Any], models: tuple[nn.Module, nn.Module]) -> Any:
    objective = instance(OBJECTIVES, name, **options)
    objective.reference = Reference(Policy(models[1]))
    return objective


def logp(model: nn.Module, example: Example) -> Tensor:
    """log p(answer | prompt), from the model's own logits over the whole vocabulary."""
    ids = torch.tensor(example.ids)
    logits_TV = model(input_ids=ids[None]).logits[0].double()
    each_T = torch.log_softmax(logits_TV[:-1], -1).gather(1, ids[1:, None])[:, 0]
    return (each_T * torch.tensor(example.weights[1:])).sum()


def sides(models: tuple[nn.Module, nn.Module], group: Group) -> tuple[Any, ...]:
    """(w, l, reference of both, tokens of both)."""
    own = [logp(models[0], e) for e in group.examples]
    with torch.no_grad():
        reference = [logp(models[1], e) for e in group.examples]
    return (*own, *reference, *(sum(w > 0 for w in e.weights) for e in group.examples))


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def step(objective: Any, model: nn.Module, groups: list[Group], tokens: int) -> tuple[Tensor, dict[str, float]]:
    """(loss, the other terms' means) of a step, divided as the loop does."""
    batches = pack(groups, tokens, share=True)
    look = getattr(objective, "stats", None)
    seen = None if look is None else look(Policy(model), batches)
    found = [objective(Policy(model), b, seen) for b in batches]
    weights = {k: sum(t[k].weight for t in found) for k in found[0]}
    loss = sum(t["loss"].total for t in found) / weights["loss"]
    return loss, {k: sum(t[k].total.item() for t in found) / weights[k] for k in weights}  # type: ignore[return-value]


@pytest.mark.parametrize("case", FORMULAS)
def test_a_pairs_loss_is_its_papers(case: str, models: tuple[nn.Module, nn.Module]) -> None:
    name, options, formula = FORMULAS[case]
    loss, means = step(objective_of(name, options, models), models[0], pairs(), 30)
    found = gradient(models[0], loss)
    known = [sides(models, g) for g in pairs()]
    expected = torch.stack([formula(*s) for s in known]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    expected_gradient = gradient(models[0], expected)
    assert (found - expected_gradient).norm() <= 1e-6 * expected_gradient.norm()
    assert means["chosen_logp"] == pytest.approx(sum(s[0].item() for s in known) / 5)
    assert means["rejected_logp"] == pytest.approx(sum(s[1].item() for s in known) / 5)
    assert means["reward_margin"] == pytest.approx(means["chosen_reward"] - means["rejected_reward"])


def test_rewards_of_dpo_are_implicit_ones(models: tuple[nn.Module, nn.Module]) -> None:
    _, means = step(objective_of("dpo", {"beta": 0.3}, models), models[0], pairs(), 30)
    known = [sides(models, g) for g in pairs()]
    rewards = [(0.3 * (s[0] - s[2]).item(), 0.3 * (s[1] - s[3]).item()) for s in known]
    assert means["chosen_reward"] == pytest.approx(sum(r[0] for r in rewards) / 5)
    assert means["rejected_reward"] == pytest.approx(sum(r[1] for r in rewards) / 5)
    assert means["reward_accuracy"] == sum(r[0] > r[1] for r in rewards) / 5


def mismatches(groups: list[Group]) -> list[Example]:
    """Each prompt with the answer of the next row, as the paper has it; cut to the longest of the rows."""
    longest = max(len(e.ids) for g in groups for e in g.examples)
    made = []
    for own, other in zip(groups, groups[1:] + groups[:1], strict=True):
        for a, b in zip(own.examples, other.examples, strict=True):
            ids = a.ids[: own.prefix] + b.ids[other.prefix :]
            weights = a.weights[: own.prefix] + b.weights[other.prefix :]
            made.append(Example(ids[:longest], weights[:longest]))
    return made


@pytest.mark.parametrize("bad", [1.0, 2.5])
@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("turned", [False, True])
def test_kto_is_its_papers(turned: bool, members: int, bad: float, models: tuple[nn.Module, nn.Module]) -> None:
    """Of single answers with a mark, and of pairs; z is 0 one way round and above 0 the other."""
    models = models[::-1] if turned else models
    groups = pairs(6, members)
    if members == 1:
        groups = [Group((Example(e.ids, e.weights, e.source, wanted=i % 3 > 0),), g.prefix)
                  for i, g in enumerate(groups) for e in g.examples]  # fmt: skip
    objective = objective_of("kto", {"undesirable_weight": bad, "beta": 0.2}, models)
    loss, means = step(objective, models[0], groups, 20)
    found = gradient(models[0], loss)
    with torch.no_grad():
        ratios = [logp(models[0], e) - logp(models[1], e) for e in mismatches(groups)]
    z = max(0.0, torch.stack(ratios).mean().item())
    assert (z > 0) == turned
    losses = []
    for g in groups:
        for k, e in enumerate(g.examples):
            r = logp(models[0], e) - logp(models[1], e).detach()
            good = e.wanted if e.wanted is not None else k == 0
            losses.append(1 - sigmoid(0.2 * (r - z)) if good else bad * (1 - sigmoid(0.2 * (z - r))))
    expected = torch.stack(losses).mean()
    assert means["kl"] == pytest.approx(z, rel=1e-6)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    expected_gradient = gradient(models[0], expected)
    assert (found - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


def test_ktos_z_of_a_step_of_one_row_is_0(models: tuple[nn.Module, nn.Module]) -> None:
    objective = objective_of("kto", {}, models[::-1])
    assert objective.stats(Policy(models[1]), pack(pairs(2), 25)) > 0
    assert objective.stats(Policy(models[1]), pack(pairs(1), 25)) == 0.0


@pytest.mark.parametrize("share", [False, True])
def test_mismatched_answers_do_not_depend_on_the_cut(share: bool) -> None:
    def rows(batches: list[Batch]) -> list[tuple[int, ...]]:
        ends = [b.cu_seqlens.tolist() for b in batches]
        each = [b.tokens_T[x:y] for b, e in zip(batches, ends, strict=True) for x, y in pairwise(e)]
        return sorted(tuple(row.tolist()) for row in each)

    expected = sorted(e.ids for e in mismatches(pairs()))
    for tokens in (1, 30, 10**6):
        assert rows(mismatched(pack(pairs(), tokens, share=share))) == expected


class Given:
    """A TokenModel whose log-probabilities are given: [T] by position in the pack."""

    def __init__(self, logp_T: Tensor) -> None:
        self.logp_T = logp_T

    def token_stats(self, batch: Batch, want: set[str]) -> dict[str, Tensor]:
        return dict.fromkeys(want, self.logp_T[: batch.n_tokens])


@pytest.mark.parametrize("name", ["dpo", "ipo", "orpo", "simpo", "cpo", "kto"])
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    """Of the loss by each of about 20 token log-probabilities."""
    named, options = ("dpo", {"loss": "ipo"}) if name == "ipo" else (name, {})
    objective = instance(OBJECTIVES, named, **options)
    groups, g = pairs(2), torch.Generator().manual_seed(0)
    (batch,) = pack(groups, 10**6)
    logp_T = -3 * torch.rand(batch.n_tokens, generator=g, dtype=torch.float64) - 0.1
    objective.reference = Given(logp_T + 0.3 * torch.randn(batch.n_tokens, generator=g, dtype=torch.float64))
    assert 15 <= batch.n_tokens <= 40 and batch.weights_T.count_nonzero() >= 8

    def loss(x_T: Tensor) -> Tensor:
        stats = (0.4,) if name == "kto" else ()
        return objective(Given(x_T), batch, *stats)["loss"].total

    assert torch.autograd.gradcheck(loss, logp_T.requires_grad_(), eps=1e-6, atol=1e-7)


def test_log_of_one_minus_exp() -> None:
    x = torch.tensor([-1e-9, -1e-3, -0.69, -0.7, -5.0, -60.0], dtype=torch.float64, requires_grad=True)
    expected = [math.log(-math.expm1(v)) for v in x.tolist()]
    y = log_1m_exp(x)
    assert y.tolist() == pytest.approx(expected, rel=1e-9)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([-math.exp(v) / -math.expm1(v) for v in x.tolist()], rel=1e-6)
    assert torch.isfinite(log_1m_exp(torch.zeros(1))).all()


def test_a_group_of_another_size_is_an_error(models: tuple[nn.Module, nn.Module]) -> None:
    (batch,) = pack(pairs(2, members=3), 10**6)
    with pytest.raises(ValueError, match="two examples"):
        objective_of("dpo", {}, models)(Policy(models[0]), batch)


@pytest.mark.parametrize(
    "name, lower, upper", [("dpo", {"beta": 0}, {"label_smoothing": 0.5}), ("simpo", {"gamma": -1}, {"beta": 0})]
)
def test_options_out_of_range(name: str, lower: dict[str, Any], upper: dict[str, Any]) -> None:
    for options in (lower, upper):
        with pytest.raises(ValueError):
            instance(OBJECTIVES, name, **options)
