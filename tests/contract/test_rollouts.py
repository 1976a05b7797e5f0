"""The losses over rollouts are their papers' formulas in float64 over whole logits, down to finite differences over 20
tokens; so is what a token is worth."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import instance
from test_preferences import Given, gradient
from torch import Tensor, nn

import tiny
from tunewright.core.example import Example, Group
from tunewright.core.spec import GRADED, parse_spec
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy
from tunewright.objectives import OBJECTIVES
from tunewright.objectives.ppo import gae
from tunewright.objectives.rollouts import Rolled
from tunewright.ops.packing import pack
from tunewright.ops.types import Batch
from tunewright.train.reference import Reference
from tunewright.train.value import ValueHead

VOCAB, LONGEST = 470, 9
Sides = tuple[Tensor, Tensor, Tensor, Tensor]  # of an answer's tokens: log p, of the reference, before, advantage


@pytest.fixture(scope="module")
def models(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, nn.Module]:
    """A policy and a reference in float64."""
    other = tiny.build_tiny_model(tmp_path_factory.mktemp("reference"), seed=1)
    return load_model(tiny_model_dir).double(), load_model(other).double()


def logps(model: nn.Module, example: Example) -> Tensor:
    """[n] log p of the answer's tokens, from the model's own logits over the whole vocabulary."""
    ids = torch.tensor(example.ids)
    logits_TV = model(input_ids=ids[None]).logits[0].double()
    each_T = torch.log_softmax(logits_TV[:-1], -1).gather(1, ids[1:, None])[:, 0]
    return each_T[torch.tensor(example.weights[1:]) > 0]


def rollouts(model: nn.Module, n: int = 3, members: int = 3) -> list[Group]:
    """Groups of answers, with advantages and with log-probabilities from before some update."""
    rng, made = random.Random(5), []
    for i in range(n):
        prompt = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(2, 5)))
        examples = []
        for _ in range(members):
            answer = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 6)))
            weights = (0.0,) * len(prompt) + (1.0,) * len(answer)
            example = Example(prompt + answer, weights, source=i + 1)
            worth, before = rng.uniform(-2, 2), (0.0,) * len(prompt)
            with torch.no_grad():
                old = [float(x) + rng.uniform(-0.4, 0.4) for x in logps(model, example)]
            numbers = {"advantage": before + (worth,) * len(answer), "old_logp": before + tuple(old)}
            # as they are in a batch, in float32
            numbers = {k: tuple(torch.tensor(v).tolist()) for k, v in numbers.items()}
            examples.append(replace(example, per_token=numbers))
        made.append(Group(tuple(examples), prefix=len(prompt)))
    return made


def sides(models: tuple[nn.Module, nn.Module], example: Example, fresh: bool) -> Sides:
    logp = logps(models[0], example)
    with torch.no_grad():
        reference = logps(models[1], example)
    start, known = len(example.ids) - len(logp), example.per_token or {}
    old, worth = (torch.tensor(known[k][start:], dtype=torch.float64) for k in ("old_logp", "advantage"))
    return logp, reference, logp.detach() if fresh else old, worth


def pessimist(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    inside = torch.clip(ratio, 1 - low, 1 + high)
    return torch.where(ratio * advantage < inside * advantage, ratio * advantage, inside * advantage)


def grpo(answers: list[Sides], low: float = 0.2, high: float = 0.2, c: float = 0.04, over: str = "token") -> Tensor:
    each = []
    for logp, reference, old, worth in answers:
        kl = torch.exp(reference - logp) - (reference - logp) - 1
        each.append(-pessimist(torch.exp(logp - old), worth, low, high) + c * kl)
    if over == "sequence":
        return torch.stack([x.mean() for x in each]).mean()
    n = sum(len(x) for x in each) if over == "token" else LONGEST * len(each)
    return sum(x.sum() for x in each) / n  # type: ignore[return-value]


def rloo(answers: list[Sides]) -> Tensor:
    ratios = [(torch.exp(logp.sum() - old.sum()), worth[0]) for logp, _, old, worth in answers]
    return -torch.stack([pessimist(r, a, 0.2, 0.2) for r, a in ratios]).mean()


FORMULAS: dict[str, tuple[str, dict[str, Any], Callable[[list[Sides]], Tensor]]] = {
    "grpo": ("grpo", {}, grpo),
    "grpo, by answer": ("grpo", {"aggregation": "sequence"}, lambda a: grpo(a, over="sequence")),
    "dr. grpo": (
        "grpo",
        {"aggregation": "constant", "max_completion_tokens": LONGEST},
        lambda a: grpo(a, over="constant"),
    ),
    "dapo": ("grpo", {"clip_high": 0.28, "kl_coefficient": 0.0}, lambda a: grpo(a, high=0.28, c=0.0)),
    "rloo": ("rloo", {}, rloo),
}


def objective_of(name: str, options: dict[str, Any], models: tuple[nn.Module, nn.Module]) -> Any:
    objective = instance(OBJECTIVES, name, **options)
    objective.reference = Reference(Policy(models[1]))
    return objective


def step(objective: Any, model: nn.Module, groups: list[Group], tokens: int) -> tuple[Tensor, dict[str, float]]:
    """(the whole loss, each term's mean), divided as the loop does."""
    found = [objective(Policy(model), b) for b in pack(groups, tokens, share=True)]
    weights = {k: sum(t[k].weight for t in found) for k in found[0]}
    loss = sum(t[k].total * t[k].coef / weights[k] for t in found for k in t if t[k].coef)
    return loss, {k: sum(t[k].total.item() for t in found) / weights[k] for k in weights}  # type: ignore[return-value]


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("case", FORMULAS)
def test_a_loss_over_rollouts_is_its_papers(case: str, fresh: bool, models: tuple[nn.Module, nn.Module]) -> None:
    """fresh: nobody kept the log-probabilities from before, so they are the present ones."""
    name, options, formula = FORMULAS[case]
    groups = rollouts(models[0])
    known = [sides(models, e, fresh) for g in groups for e in g.examples]
    if fresh:
        only = [
            tuple(replace(e, per_token={"advantage": (e.per_token or {})["advantage"]}) for e in g.examples)
            for g in groups
        ]
        groups = [replace(g, examples=examples) for g, examples in zip(groups, only, strict=True)]
    loss, means = step(objective_of(name, options, models), models[0], groups, 25)
    expected = formula(known)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-7)
    found, wanted = gradient(models[0], loss), gradient(models[0], expected)
    assert (found - wanted).norm() <= 1e-6 * wanted.norm() and wanted.norm() > 0
    everything = torch.cat([logp for logp, *_ in known])
    assert means["entropy"] == pytest.approx(-everything.mean().item(), rel=1e-6)
    assert (means["clip_share"] == 0) == fresh
    if "kl" in means:
        far = torch.cat([reference - logp for logp, reference, *_ in known])
        assert means["kl"] == pytest.approx((torch.exp(far) - far - 1).mean().item(), rel=1e-6)


class Valued(Given):
    """With what a value head says of each token, too."""

    def __init__(self, logp_T: Tensor, value_T: Tensor) -> None:
        super().__init__(logp_T)
        self.value_T = value_T

    def token_stats(self, batch: Batch, want: set[str], value: Any = None) -> dict[str, Tensor]:
        return {**super().token_stats(batch, want), "value": self.value_T}


@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo"])
def test_the_gradient_is_that_of_finite_differences(name: str, models: tuple[nn.Module, nn.Module]) -> None:
    """Of the whole loss by each of about 20 token log-probabilities, away from where the clipping has its corners."""
    objective, g = instance(OBJECTIVES, name), torch.Generator().manual_seed(0)
    (batch,) = pack(rollouts(models[0], n=2, members=2), 10**6)
    assert 8 <= batch.weights_T.count_nonzero() <= 25
    logp_T = batch.per_token["old_logp"].double() + 0.1 * torch.randn(batch.n_tokens, generator=g, dtype=torch.float64)
    other_T = logp_T + 0.3 * torch.randn(batch.n_tokens, generator=g, dtype=torch.float64)
    objective.reference, objective.value_head = Given(other_T), lambda h: h
    batch.per_token.update({"reference_logp": other_T, "old_value": other_T, "return": other_T + 0.5})

    def loss(x_T: Tensor) -> Tensor:
        terms = objective(Valued(x_T, 0.1 * x_T), batch).values()
        return torch.stack([t.coef * t.total for t in terms if t.coef]).sum()

    assert torch.autograd.gradcheck(loss, logp_T.requires_grad_(), eps=1e-6, atol=1e-6)


def test_ppo_is_its_papers(models: tuple[nn.Module, nn.Module]) -> None:
    """Loss, value loss and both gradients; the head's loss leaves the model alone."""
    model, rng = models[0], random.Random(7)
    groups, known = [], []
    for group in rollouts(model, members=1):
        (e,) = group.examples
        start, n = group.prefix, len(e.ids)
        more = {
            k: (0.0,) * start + tuple(rng.uniform(-1, 1) for _ in range(n - start)) for k in ("old_value", "return")
        }
        varied = (0.0,) * start + tuple(rng.uniform(-2, 2) for _ in range(n - start))
        numbers = {
            **(e.per_token or {}),
            **more,
            "advantage": varied,
            "reference_logp": (e.per_token or {})["old_logp"],
        }
        numbers = {k: tuple(torch.tensor(v).tolist()) for k, v in numbers.items()}
        groups.append(replace(group, examples=(replace(e, per_token=numbers),)))
        known.append((e, start, {k: torch.tensor(v[start:], dtype=torch.float64) for k, v in numbers.items()}))
    objective = instance(OBJECTIVES, "ppo")
    head = objective.value_head = ValueHead(64, torch.device("cpu"))
    nn.init.normal_(head.linear.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    losses, values, n = [], [], 0
    for e, start, had in known:
        logp = logps(model, e)
        ratio = torch.exp(logp - had["old_logp"])
        losses.append(-pessimist(ratio, had["advantage"], 0.2, 0.2).sum())
        with torch.no_grad():
            h = model.model(input_ids=torch.tensor([e.ids])).last_hidden_state[0, start - 1 : -1]
        v = h.float() @ head.linear.weight[0] + head.linear.bias
        near = had["old_value"] + torch.clip(v.double() - had["old_value"], -0.2, 0.2)
        values.append(0.5 * torch.maximum((v - had["return"]) ** 2, (near - had["return"]) ** 2).sum())
        n += len(logp)
    expected = sum(losses) / n + 0.1 * sum(values) / n
    loss, means = step(objective, model, groups, 25)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert means["value"] == pytest.approx(sum(values).item() / n, rel=1e-5)
    grads = []
    for total in (loss, expected):
        head.zero_grad()
        of_model = gradient(model, total)
        assert head.linear.weight.grad is not None
        grads.append((of_model, head.linear.weight.grad.clone()))
    for found, wanted in zip(*grads, strict=True):
        assert (found - wanted).norm() <= 1e-4 * wanted.norm() and wanted.norm() > 0


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 1.0), (0.9, 0.0)])
def test_generalised_advantages_are_the_sum_of_the_paper(gamma: float, lam: float) -> None:
    """A_t = sum_l (gamma lam)^l d_(t+l), written out; lam 1 is the return less the value, lam 0 one step's surprise."""
    rng = random.Random(1)
    r, v = ([rng.uniform(-1, 1) for _ in range(5)] for _ in range(2))
    d = [r[t] + gamma * (v[t + 1] if t < 4 else 0.0) - v[t] for t in range(5)]
    expected = [sum((gamma * lam) ** (k - t) * d[k] for k in range(t, 5)) for t in range(5)]
    found = gae(torch.tensor(r, dtype=torch.float64), torch.tensor(v, dtype=torch.float64), gamma, lam).tolist()
    assert found == pytest.approx(expected)
    if lam == 1.0:
        returns = [sum(gamma ** (k - t) * r[k] for k in range(t, 5)) for t in range(5)]
        assert found == pytest.approx([a - b for a, b in zip(returns, v, strict=True)])


def test_what_a_token_is_worth_to_ppo() -> None:
    """The reward comes with the last token, each token pays for its distance from the start, and over the step the
    advantages have mean 0 and deviation 1."""
    objective = instance(OBJECTIVES, "ppo", kl_coefficient=0.1, lam=1.0)
    value = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    rewards, far = [1.0, -0.5], 0.4
    group = [[replace(x, value=value)] for x in rolled(rewards, far=far)]
    found = [own for (own,) in objective.credit(group)]
    returns = [[-0.1 * far * i * (3 - t) + r for t in range(3)] for i, r in enumerate(rewards)]
    assert [x["return"].tolist() for x in found] == [pytest.approx(r) for r in returns]
    raw = torch.cat([torch.tensor(r, dtype=torch.float64) - value for r in returns])
    assert torch.cat([x["advantage"] for x in found]).tolist() == pytest.approx(
        ((raw - raw.mean()) / raw.std(correction=0)).tolist()
    )
    assert torch.equal(found[1]["old_logp"], group[1][0].logp) and torch.equal(found[0]["old_value"], value)


def rolled(rewards: list[float], *, far: float = 0.0) -> list[Rolled]:
    logp = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    return [Rolled(r, 3, logp=logp, reference=logp - far * i) for i, r in enumerate(rewards)]


def worth(objective: Any, group: list[Rolled]) -> list[float]:
    (found,) = objective.credit([group])
    assert all(len(set(own["advantage"].tolist())) == 1 and len(own["advantage"]) == 3 for own in found)
    return [own["advantage"][0].item() for own in found]


def test_what_an_answer_is_worth_to_grpo() -> None:
    rewards = [1.0, 0.0, 0.5, 0.0]
    mean = sum(rewards) / 4
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 3)
    expected = [(r - mean) / (std + 1e-4) for r in rewards]
    assert worth(instance(OBJECTIVES, "grpo"), rolled(rewards)) == pytest.approx(expected)
    plain = instance(OBJECTIVES, "grpo", scale_rewards=False)
    assert worth(plain, rolled(rewards)) == pytest.approx([r - mean for r in rewards])
    assert worth(instance(OBJECTIVES, "grpo"), rolled([0.3] * 4)) == [0.0] * 4


def test_what_an_answer_is_worth_to_rloo() -> None:
    rewards, c = [1.0, 0.0, 0.5, 0.0], 0.05
    paid = [r - c * 3 * 0.2 * i for i, r in enumerate(rewards)]  # three tokens, each 0.2 nats times i away
    expected = [p - (sum(paid) - p) / 3 for p in paid]
    assert worth(instance(OBJECTIVES, "rloo"), rolled(rewards, far=0.2)) == pytest.approx(expected)
    without = worth(instance(OBJECTIVES, "rloo", kl_coefficient=0.0), rolled(rewards, far=0.2))
    assert without == pytest.approx([r - (sum(rewards) - r) / 3 for r in rewards])


def test_the_format_of_their_rows_is_known_to_the_spec() -> None:
    assert set(GRADED) == {name for name in OBJECTIVES if OBJECTIVES.load(name).card.needs_rollouts}
    spec = parse_spec({"model": "m", "training_file": "f", "objective": "rloo"})
    assert spec.format == "reinforcement" and parse_spec(spec.model_dump()).format == "reinforcement"


def test_only_with_several_updates_are_the_log_probabilities_from_before_kept() -> None:
    group = rolled([1.0, 0.0])
    assert instance(OBJECTIVES, "grpo").looks == set() and instance(OBJECTIVES, "grpo", updates=2).looks == {"logp"}
    (found,) = instance(OBJECTIVES, "grpo", updates=2).credit([group])
    assert torch.equal(found[1]["old_logp"], group[1].logp)
    assert not instance(OBJECTIVES, "grpo", kl_coefficient=0.0).card.needs_reference
