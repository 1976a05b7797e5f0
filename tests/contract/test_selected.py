"""Tuners that train selected parameters: each selects what its paper says, and nothing else ever moves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import groups_for, row_gradients
from torch import Tensor, nn

import tiny
from tunewright.core.errors import CheckpointError, Diverged, SpecError, UserError
from tunewright.core.example import Group
from tunewright.models.fast_llama import FastLlama
from tunewright.models.fast_serves import why_not
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy
from tunewright.objectives.sft import SFT
from tunewright.ops.packing import collate
from tunewright.train.optim import OPTIMIZERS
from tunewright.tuners import TUNERS
from tunewright.tuners.base import Tuner
from tunewright.tuners.delta import ADDED, SPARSE, WHOLE, Piece, apply_delta, merge_delta, read_delta
from tunewright.tuners.fisher import largest
from tunewright.tuners.half import ATTENTION, REST, VECTORS, categories

SELECTING: dict[str, dict[str, Any]] = {
    "half": {"round_steps": 2},
    "child_f": {},
    "child_d": {"share": 0.2},
    "fishmask": {"k": 321},
    "bitfit": {"add_biases": True},
    "last_layers": {"layers": 1},
}
GROUPS: list[Group] = groups_for(SFT.card)
LR = 0.01


def attach(name: str, model: nn.Module, seed: int = 0, **options: Any) -> Tuner:
    part = TUNERS.load(name)
    tuner: Tuner = part(part.Options(**{**SELECTING[name], **options}))
    tuner.attach(model, seed)
    tuner.prepare(lambda n: row_gradients(model, GROUPS[:n]))
    return tuner


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def build(name: str, tuner: Tuner, **options: Any) -> torch.optim.Optimizer:
    rule = OPTIMIZERS.load(name)
    return rule.build(tuner.trainable(), LR, rule.Options(**options))


def step(
    tuner: Tuner, model: nn.Module, optimizer: torch.optim.Optimizer, number: int, policy: Policy | None = None
) -> float:
    """What the loop does in a step; returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    tuner.before_step(number)
    batch = collate(GROUPS)
    loss = SFT(SFT.Options())(policy or Policy(model), batch)["loss"].total / batch.weights_T.sum()
    loss.backward()
    tuner.on_gradients(number)
    tuner.update(optimizer, number)
    torch.autograd.graph.increment_version(list(tuner.trainable().values()))
    tuner.after_step(number)
    return loss.item()


def promised(name: str, tuner: Any, model: nn.Module, number: int) -> dict[str, Tensor]:
    """Where each tensor may move in a step, from the tuner's description."""

    def of(key: str, p: Tensor) -> Tensor:
        if name == "child_f":
            return tuner.mask(key, p, number)
        if name in ("child_d", "fishmask"):
            mask = torch.zeros(p.numel(), dtype=torch.bool)
            mask[tuner._at.get(key, torch.empty(0)).long()] = True
            return mask.view_as(p)
        whole = {
            "half": key not in tuner.frozen_in((number - 1) // 2) if name == "half" else None,
            "bitfit": key.endswith(".bias"),
            "last_layers": ".layers.1." in key,
        }[name]
        return torch.full(p.shape, bool(whole))

    return {key: of(key, p) for key, p in model.named_parameters()}


ONE_AND_ALL = [o if o == "adamw" else pytest.param(o, marks=pytest.mark.slow) for o in OPTIMIZERS]


@pytest.mark.parametrize("optimizer", ONE_AND_ALL)
@pytest.mark.parametrize("name", list(SELECTING))
def test_neither_decay_nor_momentum_moves_anything_else(name: str, optimizer: str, tiny_model_dir: Path) -> None:
    """Bit for bit, in every step; and what is promised does move."""
    model = load_model(tiny_model_dir)
    tuner = attach(name, model)
    rule = build(optimizer, tuner, weight_decay=0.5)
    moved = {key: torch.zeros(p.shape, dtype=torch.bool) for key, p in model.named_parameters()}
    for number in (1, 2, 3):
        before = snapshot(model)
        step(tuner, model, rule, number)
        allowed = promised(name, tuner, model, number)
        for key, p in model.named_parameters():
            changed = p.detach() != before[key]
            assert not (changed & ~allowed[key]).any(), f"{key} in step {number}"
            moved[key] |= changed
    if name in ("child_d", "fishmask"):
        # rows of the embedding that no text has get no gradient; adam-like rules move all others
        assert sum(int(m.sum()) for m in moved.values()) >= (321 if name == "fishmask" else 1)
    assert sum(int(m.sum()) for m in moved.values()) > 100


def test_fishmask_changes_exactly_k(tiny_model_dir: Path) -> None:
    for k in (1, 57, 4000):
        model = load_model(tiny_model_dir)
        before = snapshot(model)
        tuner = attach("fishmask", model, k=k)
        assert sum(p.numel() for p in tuner.trainable().values()) == k
        rule = build("adamw", tuner)
        for number in (1, 2):
            step(tuner, model, rule, number)
        assert sum(int((p != before[key]).sum()) for key, p in model.named_parameters()) == k


def fisher(folder: Path, groups: list[Group]) -> dict[str, Tensor]:
    """sum_n (d log p(y_n | x_n) / d w)^2 in float64, from transformers' own forward."""
    model = load_model(folder).double()
    scores = {key: torch.zeros_like(p) for key, p in model.named_parameters()}
    for group in groups:
        model.zero_grad()
        for example in group.examples:
            ids = torch.tensor([example.ids])
            logp = model(ids).logits[0, :-1].log_softmax(-1)
            taken = logp.gather(1, ids[0, 1:, None])[:, 0]
            (taken * torch.tensor(example.weights[1:], dtype=torch.float64)).sum().backward()
        for key, p in model.named_parameters():
            scores[key] += p.grad.square()  # type: ignore[union-attr]
    return scores


@pytest.mark.parametrize("name, share", [("child_d", 0.3), ("child_d", 0.1), ("fishmask", 0.01)])
def test_the_choice_is_the_top_share_by_fisher_information(name: str, share: float, tiny_model_dir: Path) -> None:
    options = {"share": share, "k": None} if name == "fishmask" else {"share": share}
    tuner: Any = attach(name, load_model(tiny_model_dir), examples=5, **options)
    scores = fisher(tiny_model_dir, GROUPS[:5])
    total = sum(s.numel() for s in scores.values())
    chosen = torch.cat([s.flatten()[tuner._at.get(key, torch.empty(0)).long()] for key, s in scores.items()])
    everything = torch.cat([s.flatten() for s in scores.values()])
    assert len(chosen) == round(share * total)
    least = everything.topk(len(chosen)).values[-1]
    assert chosen.min() >= least * (1 - 1e-3)  # float32 may swap neighbours
    torch.testing.assert_close(chosen.sum(), everything.topk(len(chosen)).values.sum(), rtol=1e-6, atol=0)


def test_the_largest_are_those_of_a_sort_and_ties_go_to_the_first() -> None:
    g = torch.Generator().manual_seed(0)
    for case in range(20):
        x = torch.rand(500, generator=g) ** 8 if case % 2 else torch.randint(0, 4, (500,), generator=g).float()
        scores = {"a": x[:120].view(12, 10), "b": x[120:121], "c": x[121:]}
        for k in (1, 7, 250, 499, 500, 600):
            found = largest(scores, k)
            flat = [start + i for name, start in (("a", 0), ("b", 120), ("c", 121)) for i in found.get(name, [])]
            order = sorted(range(500), key=lambda i: (-x[i].item(), i))
            assert sorted(map(int, flat)) == sorted(order[:k])
    with pytest.raises(Diverged, match="b"):
        largest({"a": torch.ones(2), "b": torch.tensor([float("inf")])}, 1)


def reference_gradients(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The step's gradients in float64 at these weights."""
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(weights[key])
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for example in (e for g in GROUPS for e in g.examples):
        ids = torch.tensor([example.ids])
        taken = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        total = total - (taken * torch.tensor(example.weights[1:], dtype=torch.float64)).sum()
    (total / sum(sum(e.weights[1:]) for g in GROUPS for e in g.examples)).backward()
    return {key: p.grad.clone() for key, p in model.named_parameters()}  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["child_f", pytest.param("child_d", marks=pytest.mark.slow), "fishmask"])
def test_the_update_is_the_papers(name: str, tiny_model_dir: Path) -> None:
    """AdamW in float64 over masked gradients (F: divided by p), the weights moving within the mask only."""
    model = load_model(tiny_model_dir)
    tuner: Any = attach(name, model)
    p_F = tuner.options.p if name == "child_f" else 1.0
    w = {key: p.double() for key, p in snapshot(model).items()}
    m = {key: torch.zeros_like(x) for key, x in w.items()}
    v = {key: torch.zeros_like(x) for key, x in w.items()}
    plain = load_model(tiny_model_dir).double()
    rule = build("adamw", tuner, weight_decay=0.1)
    for t in (1, 2, 3):
        grads, masks = reference_gradients(plain, w), promised(name, tuner, model, t)
        step(tuner, model, rule, t)
        for key, g in grads.items():
            g = g * masks[key] / p_F
            m[key], v[key] = 0.9 * m[key] + 0.1 * g, 0.999 * v[key] + 0.001 * g**2
            move = (m[key] / (1 - 0.9**t)) / ((v[key] / (1 - 0.999**t)).sqrt() + 1e-8)
            decay = 0.1 * w[key] if w[key].ndim > 1 else 0.0
            w[key] = w[key] - LR * masks[key] * (move + decay)
    for key, p in model.named_parameters():
        # where a gradient is nearly zero its sign, and so Adam's first step, is the rounding's
        far = (p.double() - w[key]).abs() > 1e-5
        assert far.float().mean() < 2e-3, key


def test_child_tuning_f_draws_its_share_and_keeps_the_expectation(tiny_model_dir: Path) -> None:
    model = load_model(tiny_model_dir)
    tuner: Any = attach("child_f", model, p=0.3)
    p = torch.zeros(100, 100)
    masks = torch.stack([tuner.mask("w", p, t) for t in range(1, 201)]).float()
    sigma = (0.3 * 0.7) ** 0.5
    assert abs(masks.mean().item() - 0.3) < 5 * sigma / masks.numel() ** 0.5
    per_weight = masks.mean(0)  # E[M / p] = 1 for each weight
    assert ((per_weight - 0.3).abs() < 6 * sigma / 200**0.5).all()
    assert torch.equal(tuner.mask("w", p, 7).float(), masks[6])
    assert not torch.equal(masks[0], masks[1])
    other: Any = attach("child_f", load_model(tiny_model_dir), seed=1)
    assert not torch.equal(other.mask("w", p, 1), tuner.mask("w", p, 1))
    assert not torch.equal(tuner.mask("v", p, 1), tuner.mask("w", p, 1))
    assert attach("child_f", load_model(tiny_model_dir), p=1.0).mask("w", p, 1).all()  # type: ignore[attr-defined]


def test_child_tuning_f_is_the_same_however_the_update_is_cut(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = load_model(tiny_model_dir), load_model(tiny_model_dir)
    for model, at_once in ((whole, 1 << 24), (cut, 1)):
        monkeypatch.setattr("tunewright.tuners.child_f.AT_ONCE", at_once)
        tuner = attach("child_f", model)
        rule = build("adamw", tuner, weight_decay=0.1)
        for number in (1, 2, 3):
            step(tuner, model, rule, number)
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(a, b)


FAMILIES = ["llama", "gpt2", "bert", "t5", "mixtral", "bloom"]


@pytest.mark.parametrize("family", FAMILIES)
def test_half_fine_tuning_takes_half_of_each_kind_of_each_layer(family: str) -> None:
    model = family_model(family)
    part = TUNERS.load("half")
    tuner: Any = part(part.Options(round_steps=1))
    tuner.attach(model, 3)
    for number in range(4):
        frozen = tuner.frozen_in(number)
        for kind, layers in categories(model).items():
            trained = [sum(unit[0] not in frozen for unit in units) for units in layers]
            sizes = [len(units) for units in layers]
            assert all(n in (size // 2, (size + 1) // 2) for n, size in zip(trained, sizes, strict=True))
            odd = sum(size % 2 for size in sizes)
            assert sum(trained) - sum(size // 2 for size in sizes) == odd // 2, (kind, trained, sizes)
            assert all((set(unit) <= frozen) or not (set(unit) & frozen) for units in layers for unit in units)
    in_layers = {n for layers in categories(model).values() for units in layers for unit in units for n in unit}
    assert tuner.frozen_in(0) <= in_layers and tuner.frozen_in(0) != tuner.frozen_in(1)
    assert in_layers < set(dict(model.named_parameters()))


def test_half_fine_tuning_knows_the_kinds(tiny_model_dir: Path) -> None:
    layers = categories(load_model(tiny_model_dir))
    names = {
        kind: [[u.rpartition(".layers.0.")[2] for u in unit] for unit in units[0]] for kind, units in layers.items()
    }
    assert names[ATTENTION] == [[f"self_attn.{x}_proj.weight"] for x in "qkvo"]
    assert names[REST] == [[f"mlp.{x}_proj.weight"] for x in ("gate", "up", "down")]
    assert names[VECTORS] == [["input_layernorm.weight"], ["post_attention_layernorm.weight"]]


@pytest.mark.parametrize("optimizer", ONE_AND_ALL)
def test_half_fine_tuning_drops_the_state_of_what_is_newly_frozen(optimizer: str, tiny_model_dir: Path) -> None:
    """In round 2 only what trains has a state, and what trained in both has it from round 1 on."""
    model = load_model(tiny_model_dir)
    tuner: Any = attach("half", model, round_steps=2)
    rule = build(optimizer, tuner)
    names = {p: n for n, p in model.named_parameters()}
    for number in (1, 2, 3):
        step(tuner, model, rule, number)
        assert {names[p] for p, state in rule.state.items() if state} == set(names.values()) - tuner.frozen
    first, second = tuner.frozen_in(0), tuner.frozen_in(1)
    steps = {names[p]: float(state["step"]) for p, state in rule.state.items() if "step" in state}
    for name, count in steps.items():
        assert count == (3 if name not in first else 1) and name not in second


def test_half_fine_tuning_has_a_round_an_epoch_unless_told_otherwise(tiny_model_dir: Path) -> None:
    part = TUNERS.load("half")
    for options, expected in (({}, [0] * 5 + [1] * 5), ({"round_steps": 3}, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3])):
        tuner: Any = part(part.Options(**options))
        tuner.attach(load_model(tiny_model_dir), 0)
        tuner.begin(10, 5)
        assert [tuner.round(step) for step in range(1, 11)] == expected


def family_model(family: str, **changes: Any) -> nn.Module:
    from transformers import AutoConfig

    kind, fields, _ = tiny.FAMILIES[family]
    torch.manual_seed(0)
    return tiny.auto_class(family).from_config(AutoConfig.for_model(kind, **{**tiny.SMALL, **fields, **changes}))


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "bert", "bloom"])
def test_bitfit_trains_the_biases_that_are_there(family: str) -> None:
    model = family_model(family)
    part = TUNERS.load("bitfit")
    tuner = part(part.Options())
    tuner.attach(model, 0)
    head = {"classifier.weight", "bert.pooler.dense.weight"} if family == "bert" else set()
    assert set(tuner.trainable()) == {n for n, _ in model.named_parameters() if n.endswith(".bias")} | head


def test_bitfit_without_biases_says_what_to_do(tiny_model_dir: Path) -> None:
    part = TUNERS.load("bitfit")
    with pytest.raises(SpecError, match="add_biases: true"):
        part(part.Options()).attach(load_model(tiny_model_dir), 0)


def test_added_biases_of_zero_are_kept_in_the_delta(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = load_model(tiny_model_dir)
    tuner = attach("bitfit", model)
    assert len(tuner.trainable()) == 2 * 7
    step(tuner, model, build("sgd", tuner), 1)
    tuner.save(tmp_path, "tiny")
    assert {piece.kind for piece in read_delta(tmp_path).values()} == {ADDED}
    opened = merge_delta(load_model(tiny_model_dir), tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(opened(ids).logits, model(ids).logits)


def test_added_biases_that_transformers_has_no_place_for_are_not_merged() -> None:
    part = TUNERS.load("bitfit")
    tuner = part(part.Options(add_biases=True))
    tuner.attach(family_model("qwen2"), 0)
    with pytest.raises(UserError, match="no place for the added biases"):
        tuner.merge()


@pytest.mark.parametrize(
    "family, stack", [("llama", "model.layers."), ("t5", "decoder.block."), ("gpt2", "transformer.h.")]
)
def test_last_layers_are_those_of_the_decoder(family: str, stack: str) -> None:
    part = TUNERS.load("last_layers")
    model = family_model(family)
    tuner = part(part.Options(layers=1))
    tuner.attach(model, 0)
    assert set(tuner.trainable()) == {n for n, _ in model.named_parameters() if n.startswith(f"{stack}1.")}
    with pytest.raises(SpecError, match="layers is 3, but the model has 2 layers"):
        part(part.Options(layers=3)).attach(family_model(family), 0)


def pieces(model: nn.Module) -> dict[str, Piece]:
    """One of each kind."""
    size = dict(model.named_parameters())["model.embed_tokens.weight"].shape
    values = torch.tensor([1.0, -2.5, float(2**-140)])
    return {
        "model.embed_tokens.weight": Piece(SPARSE, tuple(size), values, torch.tensor([0, 77, size.numel() - 1])),
        "model.norm.weight": Piece(WHOLE, (64,), torch.linspace(-3, 3, 64)),
        "model.layers.0.mlp.up_proj.bias": Piece(ADDED, (128,), torch.linspace(0, 1, 128)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_delta_is_applied_and_removed_exactly(dtype: torch.dtype, tiny_model_dir: Path) -> None:
    model = load_model(tiny_model_dir, dtype)
    before, delta = snapshot(model), pieces(model)
    undo = apply_delta(model, delta)
    now = snapshot(model)
    assert torch.equal(
        now["model.embed_tokens.weight"].view(-1)[[0, 77, -1]], delta["model.embed_tokens.weight"].values.to(dtype)
    )
    assert torch.equal(now["model.norm.weight"], delta["model.norm.weight"].values.to(dtype))
    assert model.get_submodule("model.layers.0.mlp.up_proj").bias.dtype == dtype  # type: ignore[union-attr]
    redo = apply_delta(model, undo)
    after = snapshot(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    apply_delta(model, redo)
    assert all(torch.equal(p, now[key]) for key, p in snapshot(model).items())


@pytest.mark.parametrize("wrong", ["name", "shape", "bias that is there", "no layer"])
def test_a_delta_that_does_not_fit_changes_nothing(wrong: str, tiny_model_dir: Path) -> None:
    model = load_model(tiny_model_dir)
    before, delta = snapshot(model), pieces(model)
    bad = {
        "name": ("model.norms.weight", Piece(WHOLE, (64,), torch.zeros(64))),
        "shape": ("model.norm.weight", Piece(WHOLE, (63,), torch.zeros(63))),
        "bias that is there": ("model.layers.0.mlp.up_proj.bias", Piece(ADDED, (127,), torch.zeros(127))),
        "no layer": ("model.norm.bias", Piece(ADDED, (64,), torch.zeros(64))),
    }[wrong]
    with pytest.raises(CheckpointError, match="does not fit its base model: 1 tensors differ"):
        apply_delta(model, {**delta, bad[0]: bad[1]})
    assert all(torch.equal(p, before[key]) for key, p in snapshot(model).items())
    assert model.get_submodule("model.layers.0.mlp.up_proj").bias is None


def test_entries_chosen_elsewhere_are_taken_over_or_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    made = attach("fishmask", load_model(tiny_model_dir), k=50)
    made.save(tmp_path, "tiny")
    part = TUNERS.load("fishmask")
    for k, message in ((50, None), (51, "it changes 50 entries, this job trains 51")):
        fresh: Any = part(part.Options(k=k))
        fresh.attach(load_model(tiny_model_dir), 0)
        if message is None:
            fresh.load(tmp_path)
            fresh.prepare(no_data)
            assert all(torch.equal(at, made._at[name]) for name, at in fresh._at.items())  # type: ignore[attr-defined]
        else:
            with pytest.raises(SpecError, match=message):
                fresh.load(tmp_path)
    other = attach("fishmask", load_model(tiny_model_dir), k=50, examples=1)
    with pytest.raises(SpecError, match="does not fit"):
        other.load(tmp_path)


def no_data(n: int) -> Iterator[None]:
    raise AssertionError("what load() brought is not chosen again")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SELECTING))
def test_the_fast_path_says_the_same(name: str, tiny_model_dir: Path, kernels: Any) -> None:
    """Losses of five steps, so that it also takes over what changed."""
    folder = tiny_model_dir
    losses: dict[bool, list[float]] = {}
    for is_fast in (False, True):
        model = load_model(folder)
        tuner = attach(name, model)
        assert why_not(model, torch.float32) is None
        policy = Policy(model, fast=FastLlama(model, torch.float32, kernels) if is_fast else None)
        rule = build("adamw", tuner, weight_decay=0.1)
        losses[is_fast] = [step(tuner, model, rule, number, policy) for number in range(1, 6)]
        with tuner.off(), torch.no_grad():
            batch = collate(GROUPS)
            total = SFT(SFT.Options())(policy, batch)["loss"].total.item()
            losses[is_fast].append(total / batch.weights_T.sum().item())
    assert losses[True] == pytest.approx(losses[False], abs=1e-4)
    assert losses[True][4] < losses[True][0] - 1e-3
    assert losses[True][5] == pytest.approx(losses[True][0], abs=1e-5)
