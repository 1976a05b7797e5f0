"""Objectives over whole rows and texts against their formulas in float64, scikit-learn, and finite differences."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from parts import groups_for, instance
from sklearn.metrics import f1_score
from torch import Tensor

from tunewright.core.errors import SpecError
from tunewright.core.example import Example, Group
from tunewright.objectives import OBJECTIVES
from tunewright.ops.logprob import divergence_of
from tunewright.ops.packing import collate
from tunewright.ops.types import Batch, Term

LABELS = ("a", "b", "c")


class Leaf:
    """A model whose scores are what is trained, in float64."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def scores(self, batch: Batch) -> Tensor:
        return self.values

    def token_stats(self, batch: Batch, want: set[str]) -> dict[str, Tensor]:
        logp = self.values.log_softmax(-1)
        at = batch.targets_T[:, None]
        return {"logp": logp.gather(-1, at)[:, 0], "correct": (logp.argmax(-1) == batch.targets_T).double()}

    def compare(
        self, batch: Batch, teacher: Any, want: set[str], kind: str, beta: float, temperature: float
    ) -> dict[str, Tensor]:
        ours, theirs = ((x / temperature).log_softmax(-1) for x in (self.values, teacher.values))
        return {**self.token_stats(batch, want), "divergence": divergence_of(ours, theirs, kind, beta)}


def made(name: str, counts: tuple[int, ...] = (6, 3, 1), n: int = 10, **options: Any) -> Any:
    part = OBJECTIVES.load(name)
    objective = part(part.Options(**options))
    objective.begin(LABELS, counts, n)
    return objective


def rows_of(**values: list[Any]) -> Batch:
    """A batch of rows of two tokens with such labels."""
    (name, column), *_ = values.items()
    return collate([Group((Example((1, 2), (0.0, 0.0), i, **{name: v}),)) for i, v in enumerate(column)])


def random_scores(n: int, width: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def means(terms: dict[str, Term]) -> dict[str, float]:
    return {k: float(t.total) / t.weight for k, t in terms.items()}


CLASSES = [0, 2, 1, 0, 0, 1, 2, 0, 1, 0, 0]
SETS = [(), (0,), (1, 2), (0, 1), (2,), (0, 1, 2), (), (1,)]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("weights", ["none", "balanced", {"b": 3.0, "c": 0.25}])
def test_classification_is_the_papers_formula(gamma: float, weights: Any) -> None:
    z = random_scores(len(CLASSES), 3)
    got = made("classify", class_weights=weights, focal_gamma=gamma)(Leaf(z), rows_of(label=CLASSES))["loss"]
    w = {"none": [1.0] * 3, "balanced": [10 / 18, 10 / 9, 10 / 3]}.get(str(weights), [1.0, 3.0, 0.25])
    p = [math.exp(row[k]) / sum(map(math.exp, row)) for row, k in zip(z.tolist(), CLASSES, strict=True)]
    want = sum(-w[k] * (1 - q) ** gamma * math.log(q) for q, k in zip(p, CLASSES, strict=True))
    assert float(got.total) == pytest.approx(want, rel=1e-6)
    assert got.weight == pytest.approx(sum(w[k] for k in CLASSES))
    if gamma == 0:
        torchs = torch.nn.functional.cross_entropy(z, torch.tensor(CLASSES), torch.tensor(w, dtype=torch.float64))
        assert float(got.total) / got.weight == pytest.approx(float(torchs), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("weights", ["none", "balanced", {"b": 3.0}])
def test_several_classes_are_the_papers_formula(gamma: float, weights: Any) -> None:
    z = random_scores(len(SETS), 3, 1)
    got = made("multilabel", class_weights=weights, focal_gamma=gamma)(Leaf(z), rows_of(labels=SETS))["loss"]
    w = {"none": [1.0] * 3, "balanced": [4 / 6, 7 / 3, 9.0]}.get(str(weights), [1.0, 3.0, 1.0])
    want = 0.0
    for row, has in zip(z.tolist(), SETS, strict=True):
        for k, x in enumerate(row):
            q = 1 / (1 + math.exp(-x))
            want -= (w[k] * (1 - q) ** gamma * math.log(q) if k in has else q**gamma * math.log(1 - q)) / 3
    assert float(got.total) == pytest.approx(want, rel=1e-6) and got.weight == len(SETS)


def test_a_batch_whose_rows_have_only_the_first_classes_counts_the_others_as_absent() -> None:
    z = random_scores(2, 3)
    narrow = rows_of(labels=[(0,), ()])
    assert narrow.per_segment["labels"].shape == (2, 1)
    got = made("multilabel")(Leaf(z), narrow)
    true = torch.zeros(2, 3, dtype=torch.float64)
    true[0, 0] = 1
    want = torch.nn.functional.binary_cross_entropy_with_logits(z, true)
    assert means(got)["loss"] == pytest.approx(float(want), rel=1e-6)


def test_f1_is_scikit_learns() -> None:
    z = random_scores(len(CLASSES), 3, 3)
    single = made("classify")
    found = single.report(means(single(Leaf(z), rows_of(label=CLASSES))))
    said = z.argmax(-1).tolist()
    for average in ("macro", "micro"):
        assert found[f"{average}_f1"] == pytest.approx(f1_score(CLASSES, said, average=average, zero_division=0))
    several = made("multilabel")
    z = random_scores(len(SETS), 3, 4)
    found = several.report(means(several(Leaf(z), rows_of(labels=SETS))))
    true = [[k in has for k in range(3)] for has in SETS]
    for average in ("macro", "micro"):
        assert found[f"{average}_f1"] == pytest.approx(f1_score(true, (z > 0).tolist(), average=average))
    exact = sum((row > 0).tolist() == t for row, t in zip(z, true, strict=True)) / len(SETS)
    assert found["accuracy"] == pytest.approx(exact)


@pytest.mark.parametrize("margins", [(None, None, None, None), (1.5, None, 0.0, 0.3)])
@pytest.mark.parametrize("center", [0.0, 0.1])
def test_the_reward_model_is_bradley_terry(margins: tuple[float | None, ...], center: float) -> None:
    pairs = [
        Group((Example((1, 2, 3), (0.0, 1.0, 1.0), i, margin=m), Example((1, 4), (0.0, 1.0), i)))
        for i, m in enumerate(margins)
    ]
    r = random_scores(8, 1, 5)
    part = OBJECTIVES.load("reward")
    objective = part(part.Options(center=center))
    got = objective(Leaf(r), collate(pairs))
    gaps = [(float(r[2 * i]) - float(r[2 * i + 1]), float(r[2 * i]) + float(r[2 * i + 1])) for i in range(4)]
    want = [-math.log(1 / (1 + math.exp(-(d - (m or 0.0))))) for (d, _), m in zip(gaps, margins, strict=True)]
    assert float(got["loss"].total) == pytest.approx(sum(want), rel=1e-6) and got["loss"].weight == 4
    assert (got["center"].coef, float(got["center"].total)) == (center, pytest.approx(sum(s * s for _, s in gaps)))
    found = objective.report(means(got))
    assert found == {
        "pair_accuracy": sum(d > 0 for d, _ in gaps) / 4,
        "reward_margin": pytest.approx(sum(d for d, _ in gaps) / 4),
    }


@pytest.mark.parametrize("name", ["classify", "multilabel", "regress", "reward", "pretrain", "distill"])
def test_gradients_are_finite_differences(name: str) -> None:
    """Over some 20 tokens, with every option that changes the loss."""
    options = {
        "classify": {"class_weights": {"b": 3.0}, "focal_gamma": 2.0},
        "multilabel": {"class_weights": {"b": 3.0}, "focal_gamma": 2.0},
        "reward": {"center": 0.1},
        "distill": {"kind": "jsd", "beta": 0.3, "temperature": 2.0, "hard": 0.25},
    }.get(name, {})
    part = OBJECTIVES.load(name)
    objective = part(part.Options(**options))
    if hasattr(objective, "begin"):
        objective.begin(LABELS, (1, 1, 1), 3)
    batch = collate(groups_for(part.card, n=4, vocab=7))
    width = {"classify": 3, "multilabel": 3, "pretrain": 7, "distill": 7}.get(name, 1)
    leaf = random_scores(batch.n_tokens if width == 7 else batch.n_segments, width).requires_grad_()
    objective.teacher = Leaf(random_scores(batch.n_tokens, width, 8))

    def loss(values: Tensor) -> Tensor:
        return torch.stack([t.coef * t.total.double() for t in objective(Leaf(values), batch).values() if t.coef]).sum()

    assert torch.autograd.gradcheck(loss, (leaf,), atol=1e-4, rtol=1e-3)


def test_perplexity() -> None:
    objective = instance(OBJECTIVES, "pretrain")
    rng = random.Random(0)
    batch = collate([Group((Example(tuple(rng.randrange(7) for _ in range(9)), (0.0, *[1.0] * 8)),))])
    got = means(objective(Leaf(torch.zeros(9, 7, dtype=torch.float64)), batch))
    assert objective.report(got) == {"perplexity": pytest.approx(7.0)}  # all 7 tokens are equally likely


@pytest.mark.parametrize(
    ("weights", "said"),
    [({"B": 1.0}, r"no class 'B' \(classes: a, b, c\) Did you mean 'b'"), ({"a": -1.0}, "weight of 'a' is -1")],
)
def test_weights_of_what_is_no_class_are_refused(weights: dict[str, float], said: str) -> None:
    for name in ("classify", "multilabel"):
        with pytest.raises(SpecError, match=said):
            made(name, class_weights=weights)
