"""The law of every method against forgetting, with every tuner and objective: 0 at the start, any cut the same."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parts import groups_for
from pydantic import ValidationError
from retain_kit import Step, make, shake, step
from torch import Tensor
from torch.nn import functional as F

import tiny
from tunewright.core.example import Example, Group
from tunewright.core.spec import parse_spec
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy
from tunewright.objectives import OBJECTIVES
from tunewright.ops.packing import collate, pack
from tunewright.train.fit import work_of
from tunewright.train.loop import Parts
from tunewright.train.retain import RETAIN
from tunewright.train.retain.base import pull_back
from tunewright.train.retain.build import extra_bytes
from tunewright.tuners import TUNERS

# beside LoRA all weights, a part of them in each round
USUAL = ("lora", "half")
TUNERS_HERE = [t if t in USUAL else pytest.param(t, marks=[pytest.mark.slow, pytest.mark.nightly]) for t in TUNERS]
PENALTIES = ("ewc", "l2sp")


def plain(parts: Parts) -> Parts:
    return replace(parts, retain=())


def groups_of(parts: Parts) -> list[Any]:
    return groups_for(parts.objective.card)


def assert_same(a: Step, b: Step, rel: float = 1e-4) -> None:
    assert a[0] == pytest.approx(b[0], rel=rel, abs=1e-6)
    assert set(a[1]) == set(b[1]) != set()
    for k, grad in a[1].items():
        assert (grad - b[1][k]).norm() <= rel * b[1][k].norm() + 1e-7, k


@pytest.mark.parametrize("name", list(RETAIN))
def test_card_and_options(name: str) -> None:
    entry = RETAIN.load(name)
    assert entry.card.title and entry.card.rows in ("required", "optional", "none") and entry.__doc__
    json.dumps(entry.Options.model_json_schema())
    assert ("file" in entry.Options().model_dump()) == (entry.card.rows != "none")
    with pytest.raises(ValidationError):
        entry.Options(no_such_option=1)


def laws(parts: Parts) -> None:
    """At the start nothing is held or far; later every method says something, and any cut of the step is the step."""
    groups = groups_of(parts)
    only_far = replace(parts, retain=[m for m in parts.retain if m.key != "replay"])
    start, without = step(only_far, groups), step(plain(parts), groups)
    if parts.tuner.card.identity_at_start:
        assert all(abs(start[0][f"retain_{k}"]) < 1e-6 for k in ("kl", *PENALTIES))
        assert_same((without[0], start[1]), without)
    shake(parts)
    whole = step(parts, groups)
    assert all(math.isfinite(v) for v in whole[0].values())
    assert all(whole[0][f"retain_{k}"] > 0 for k in RETAIN)
    alone = step(plain(parts), groups)
    assert {k: v for k, v in whole[0].items() if not k.startswith("retain_")} == pytest.approx(alone[0])
    assert any(not torch.allclose(whole[1][k], alone[1][k], rtol=1e-3) for k in alone[1])
    assert set(whole[1]) == set(alone[1])  # nothing trains that would not train without them
    for tokens in (1, 40):
        assert_same(step(parts, groups, tokens), whole)


@pytest.mark.parametrize("tuner", TUNERS_HERE)
def test_with_every_tuner(tuner: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    laws(make(tiny_model_dir, tmp_path, tuner))


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o != "sft"])
@pytest.mark.parametrize("tuner", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_with_every_objective(objective: str, tuner: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Retained rows are learned by the plain objective of the head, whatever the job's own is."""
    laws(make(tiny_model_dir, tmp_path, tuner, objective))


# --- against independent references -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_fisher_is_the_formula_in_float64(tuner: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Row by row through the model's own logits in float64; the penalty and its gradient from it."""
    rows = groups_for(OBJECTIVES.load("sft").card, n=4)
    parts = make(tiny_model_dir, tmp_path, tuner, methods={"ewc": {"coefficient": 30.0}}, rows=rows)
    (method,) = parts.retain
    other = make(tiny_model_dir, tmp_path / "b", tuner, methods={})
    model = other.policy.model.double()
    trained = other.tuner.trainable()
    wanted = {name: torch.zeros_like(p) for name, p in trained.items()}
    weight = 0.0
    for group in rows:
        (example,) = group.examples
        logp = model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
        told = [w * logp[t, y] for t, (y, w) in enumerate(zip(example.ids[1:], example.weights[1:], strict=True))]
        for (name, _), g in zip(
            trained.items(), torch.autograd.grad(torch.stack(told).sum(), list(trained.values())), strict=True
        ):
            wanted[name] += g**2
        weight += sum(example.weights[1:])
    for name, f in method._fisher.items():
        torch.testing.assert_close(f.double(), wanted[name] / weight, rtol=2e-3, atol=1e-9)
    shake(parts)
    start = {name: p.detach() for name, p in trained.items()}
    far = {name: p.detach().double() - start[name] for name, p in parts.tuner.trainable().items()}
    value = 15.0 * sum(float((wanted[name] / weight * d**2).sum()) for name, d in far.items())
    got, grads = step(parts, rows)
    before = step(plain(parts), rows)[1]
    assert got["retain_ewc"] == pytest.approx(value, rel=2e-3)
    for name, grad in grads.items():
        pull = 30.0 * wanted[name] / weight * far[name]
        assert ((grad - before[name]).double() - pull).norm() <= 3e-3 * pull.norm() + 1e-6 * grad.norm() + 1e-9, name


def test_a_pull_is_autograds_gradient_of_the_penalty() -> None:
    g = torch.Generator().manual_seed(0)
    shapes = {"matrix": (7, 5), "vector": (4,), "number": (), "experts": (3, 2, 4), "frozen": (2, 2)}
    draw = {k: torch.randn(s, generator=g, dtype=torch.float64) for k, s in shapes.items()}
    start = {k: torch.randn(s, generator=g, dtype=torch.float64) for k, s in shapes.items()}
    for importance in (None, {k: torch.rand(s, generator=g, dtype=torch.float64) for k, s in shapes.items()}):
        parameters = {k: torch.nn.Parameter(t.clone()) for k, t in draw.items()}
        for k, p in parameters.items():
            p.grad = None if k == "frozen" else torch.ones_like(p)
        value = pull_back(parameters, start, 0.3, importance)
        trained = {k: t.clone().requires_grad_() for k, t in draw.items() if k != "frozen"}
        weights = importance or {k: torch.ones_like(t) for k, t in draw.items()}
        penalty = 0.15 * sum((weights[k] * (t - start[k]) ** 2).sum() for k, t in trained.items())
        penalty.backward()  # type: ignore[union-attr]
        assert value == pytest.approx(penalty.item())  # type: ignore[union-attr]
        assert parameters["frozen"].grad is None
        for k, t in trained.items():
            torch.testing.assert_close(parameters[k].grad, 1 + t.grad)  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["forward", *(pytest.param(k, marks=pytest.mark.slow) for k in ("reverse", "jsd"))])
def test_kl_is_that_of_the_full_logits(kind: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    parts = make(tiny_model_dir, tmp_path, methods={"kl": {"kind": kind, "coefficient": 2.5}})
    shake(parts)
    base = load_model(tiny_model_dir).double()
    groups, total, weight = groups_of(parts), 0.0, 0.0
    with torch.no_grad():
        for e in (e for g in groups for e in g.examples):
            ids = torch.tensor([e.ids])
            p = base(ids).logits[0, :-1].log_softmax(-1)
            q = parts.policy.model(ids).logits[0, :-1].double().log_softmax(-1)
            w = torch.tensor(e.weights[1:], dtype=torch.float64)
            m = torch.logaddexp(p, q) - math.log(2)
            far = {
                "forward": F.kl_div(q, p, log_target=True, reduction="none").sum(-1),
                "reverse": F.kl_div(p, q, log_target=True, reduction="none").sum(-1),
                "jsd": 0.5 * sum(F.kl_div(m, x, log_target=True, reduction="none").sum(-1) for x in (p, q)),
            }[kind]
            total += float((w * far).sum())
            weight += float(w.sum())
    got, grads = step(parts, groups)
    assert got["retain_kl"] == pytest.approx(total / weight, rel=1e-4)
    # the coefficient is in the gradient, not in the number that is shown
    small = make(tiny_model_dir, tmp_path, methods={"kl": {"kind": kind, "coefficient": 1.0}})
    shake(small)
    ones, plain_ = step(small, groups)[1], step(plain(small), groups)[1]
    for name in grads:
        torch.testing.assert_close(grads[name] - plain_[name], 2.5 * (ones[name] - plain_[name]), rtol=1e-3, atol=1e-6)


def test_replay_is_the_mean_loss_of_its_rows_beside_the_job_s(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Plain transformers over the drawn rows; each row comes once before any comes again."""
    old = groups_for(OBJECTIVES.load("sft").card, n=5, vocab=300)
    parts = make(tiny_model_dir, tmp_path, methods={"replay": {"share": 0.25, "coefficient": 0.5}}, rows=old)
    (method,) = parts.retain
    seen = [g.examples[0].source for s in range(1, 6) for g in method.draw(s, [])]
    assert len(seen) == 10 and sorted(seen[:5]) == sorted(seen[5:]) == [1, 2, 3, 4, 5]
    drawn = [g.examples[0] for g in method.draw(1, [])]
    assert len(drawn) == 2  # a quarter of 8
    with torch.no_grad():
        logp = [parts.policy.model(torch.tensor([e.ids])).logits[0].log_softmax(-1) for e in drawn]
    told = [
        (w, lp[t, y])
        for e, lp in zip(drawn, logp, strict=True)
        for t, (y, w) in enumerate(zip(e.ids[1:], e.weights[1:], strict=True))
    ]
    wanted = -sum(float(w * x) for w, x in told) / sum(w for w, _ in told)
    groups = groups_of(parts)
    got, grads = step(parts, groups)
    assert got["retain_replay"] == pytest.approx(wanted, rel=1e-4)
    alone, own = step(plain(parts), groups)[1], step(plain(parts), list(method.draw(1, [])))[1]
    for name, grad in grads.items():
        torch.testing.assert_close(grad, alone[name] + 0.5 * own[name], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_drawn_labels_give_the_true_fisher(tiny_model_dir: Path, tmp_path: Path) -> None:
    """One supervised token: F = sum_v p(v) (d log p(v))^2, and 250 draws come near its trace."""
    (group,) = groups_for(OBJECTIVES.load("sft").card, n=1)
    e = group.examples[0]
    one = replace(e, weights=tuple(float(i == len(e.ids) - 1) for i in range(len(e.ids))))
    rows = [replace(group, examples=(one,))] * 250
    options = {"labels": "sampled", "examples": 250}
    parts = make(tiny_model_dir, tmp_path, "last_layers", methods={"ewc": options}, rows=rows)
    trained = parts.tuner.trainable()
    logp = parts.policy.model(torch.tensor([e.ids])).logits[0, -2].log_softmax(-1)
    wanted = dict.fromkeys(trained, 0.0)
    for v in logp.argsort(descending=True)[:120].tolist():
        grads = torch.autograd.grad(logp[v], list(trained.values()), retain_graph=True)
        for name, g in zip(trained, grads, strict=True):
            wanted[name] += float(logp[v].detach().exp()) * float((g**2).sum())
    (method,) = parts.retain
    got = {name: float(f.sum()) for name, f in method._fisher.items()}
    rest = 1 - logp.detach().exp().topk(120).values.sum().item()
    assert sum(got.values()) == pytest.approx(sum(wanted.values()) / (1 - rest), rel=0.2)
    empirical = make(tiny_model_dir, tmp_path / "b", "last_layers", methods={"ewc": {}}, rows=rows[:1])
    own = empirical.retain[0]._fisher
    assert any((f - own[name]).norm() > 0.3 * f.norm() for name, f in method._fisher.items())


def test_the_fisher_is_measured_once(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A later attempt reads it; a damaged one is measured again and is the same."""
    first = make(tiny_model_dir, tmp_path, methods={"ewc": {}}).retain[0]._fisher
    path = tmp_path / "ewc" / "fisher.safetensors"
    kept = path.stat().st_mtime_ns
    again = make(tiny_model_dir, tmp_path, methods={"ewc": {}}).retain[0]._fisher
    assert path.stat().st_mtime_ns == kept
    path.write_bytes(path.read_bytes()[:-8])
    damaged = make(tiny_model_dir, tmp_path, methods={"ewc": {}}).retain[0]._fisher
    for name, f in first.items():
        assert torch.equal(f, again[name]) and torch.equal(f, damaged[name])
    assert any(f.any() for f in first.values())


# --- forgetting -------------------------------------------------------------------------------------------------------

HELD: dict[str, dict[str, dict[str, Any]]] = {
    "replay": {"replay": {}},
    "ewc": {"ewc": {}},
    "l2sp": {"l2sp": {}},
    "kl": {"kl": {}},
    "kl on retained rows": {"kl": {"file": "old"}},
}


def task(marker: int, answers: int) -> list[Group]:
    """Rows `marker key key -> a, b`: a follows from the key, b is one of three, as in a language nothing is certain.

    Two tasks have the same keys and other answers.
    """
    g = torch.Generator().manual_seed(marker)
    rows: list[Group] = []
    for key in range(10):
        first = int(torch.randint(0, 12, (1,), generator=g)) + answers
        for second in (torch.randint(0, 12, (3,), generator=g) + answers).tolist():
            ids = (marker, 20 + key, 40 + key, first, second)
            rows.append(Group((Example(ids, (0.0, 0.0, 0.0, 1.0, 1.0), len(rows) + 1),)))
    return rows


def loss_on(policy: Policy, rows: list[Any]) -> float:
    batch = collate(rows)
    with torch.no_grad():
        got = policy.token_stats(batch, want={"logp"})["logp"]
    return -float((got * batch.weights_T).sum() / batch.weights_T.sum())


def train_on(parts: Parts, rows: list[Any], steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(parts.tuner.trainable().values(), lr=rate, weight_decay=0.0)
    for number in range(1, steps + 1):
        step(parts, [rows[(number * 8 + i) % len(rows)] for i in range(8)], number=number)
        torch.nn.utils.clip_grad_norm_(list(parts.tuner.trainable().values()), 1.0)
        parts.tuner.update(optimizer, number)
        parts.tuner.after_step(number)


@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["full", pytest.param("lora", marks=pytest.mark.nightly)])
def test_each_forgets_less_than_plain_training(tuner: str, tmp_path: Path) -> None:
    """Three seeds, all options at their defaults: a model that knows one task learns another in the same steps."""
    old, new = task(7, 60), task(8, 72)
    for seed in range(3):
        folder = tiny.build_tiny_model(tmp_path / f"m{seed}", seed=seed, num_hidden_layers=1, vocab_size=128)
        knows = make(folder, tmp_path / f"k{seed}", "full", methods={})
        train_on(knows, old, 80, 3e-3)
        knows.policy.model.save_pretrained(folder)  # type: ignore[operator]
        known, start = loss_on(knows.policy, old), loss_on(knows.policy, new)
        lost, learned = {}, {}
        for name, methods in {"plain": {}, **HELD}.items():
            parts = make(folder, tmp_path / f"{name}{seed}", tuner, methods=methods, rows=old)
            train_on(parts, new, 50, {"full": 3e-3, "lora": 1e-2}[tuner])
            lost[name], learned[name] = loss_on(parts.policy, old) - known, loss_on(parts.policy, new)
        assert known < 0.7 and start > 6 and lost["plain"] > 2.5, (known, start, lost)
        for name in HELD:
            assert lost[name] < 0.5 * lost["plain"], (seed, name, lost)
            assert learned[name] < start - 4, (seed, name, learned, start)


def test_micro_batches_of_retained_rows_are_as_large_as_the_job_s(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Their rows are packed by the same budget, so what fits for the job fits for them."""
    parts = make(tiny_model_dir, tmp_path, methods={"replay": {"share": 1.0}})
    seen: list[int] = []
    (method,) = parts.retain
    inner = method.objective

    class Watched:
        def weights(self, batch: Any) -> dict[str, float]:
            return inner.weights(batch)

        def __call__(self, policy: Any, batch: Any) -> Any:
            seen.append(batch.n_tokens)
            return inner(policy, batch)

    method.objective = Watched()
    step(parts, groups_of(parts), 30)
    assert len(seen) == len(pack(list(method.draw(1, [])), 30)) > 1 and max(seen) <= 30


def test_entries_keep_their_place(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A frozen half is not pulled: its gradient stays away, so its bits do."""
    parts = make(tiny_model_dir, tmp_path, "half", methods={"l2sp": {"coefficient": 10.0}})
    shake(parts)
    _, grads = step(parts, groups_of(parts))
    frozen: frozenset[str] = parts.tuner.frozen  # type: ignore[attr-defined]
    assert frozen and not set(grads) & frozen
    values: dict[str, Tensor] = parts.tuner.trainable()
    assert set(grads) | frozen == set(values)


def test_the_preflight_sees_their_rows_and_copies(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The heaviest micro-batch of a step is one of retained rows where these are longer; `kl` runs the job's again."""
    long = [Group((Example((7,) * n, (0.0, *[1.0] * (n - 1)), n),)) for n in (90, 40, 200, 50)]
    methods = {"replay": {"share": 0.25}, "kl": {}, "l2sp": {}}
    parts = replace(make(tiny_model_dir, tmp_path, methods=methods, rows=long), plan=SimpleNamespace(batch_size=8))
    heavy = groups_of(parts)
    (objective, own), (replay, longest), (kl, again) = work_of(parts, heavy, 64)
    assert objective is parts.objective and own is heavy is again
    assert [m.key for m in (replay, kl)] == ["replay", "kl"]  # type: ignore[attr-defined]
    assert [g.n_tokens for g in longest] == [200]  # alone, above the budget
    assert sorted(g.n_tokens for g in work_of(parts, heavy, 300)[1][1]) == [90, 200]  # two rows a step
    fields = {"model": "m", "training_file": "t", "retain": [{"name": n, "file": "f"} for n in ("replay", "ewc", "kl")]}
    spec = parse_spec(fields)
    cards = {name: TUNERS.load(name).card for name in ("full", "lora", "fishmask", "bitfit")}
    assert extra_bytes(spec, cards["full"], 2, False) == 8 + 4  # Fisher and start; a second model in float32
    assert extra_bytes(spec, cards["lora"], 2, False) == 0  # switched off for the reference
    assert extra_bytes(spec, cards["lora"], 2, True) == 2
    assert (extra_bytes(spec, cards["fishmask"], 2, False), extra_bytes(spec, cards["bitfit"], 2, False)) == (4, 2)
