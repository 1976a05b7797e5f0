"""The fast path says what the plain modules say: loss, gradients, any cut of a step, off and on, all that it keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from plain import assert_relative, fast, give_biases, lora, plain_loss, plain_model, rows_to_groups, step
from torch import Tensor, nn

import tiny
from tunewright.core.example import Example, Group
from tunewright.models.fast_serves import why_not
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy
from tunewright.objectives.sft import SFT
from tunewright.ops.kernels import Kernels
from tunewright.ops.lora import TorchProduct
from tunewright.ops.packing import collate
from tunewright.train.fast import choose_path
from tunewright.tuners import TUNERS
from tunewright.tuners.full import Full


@pytest.fixture(scope="module")
def groups(tiny_model_dir: Path) -> list[Group]:
    return rows_to_groups(tiny_model_dir, tiny.sft_rows(7))


@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj", "up_proj"], "r": 3}], ids=["all", "some"])
def test_a_step_is_that_of_transformers_and_peft(
    tiny_model_dir: Path, groups: list[Group], kernels: Kernels, tmp_path: Path, options: dict[str, Any]
) -> None:
    tuner, model = lora(tiny_model_dir, **options)
    tuner.save(tmp_path, str(tiny_model_dir))
    reference = PeftModel.from_pretrained(plain_model(tiny_model_dir), tmp_path, is_trainable=True)
    want = plain_loss(reference, groups)
    want.backward()
    loss, grads = step(fast(model, kernels), groups)
    assert loss == pytest.approx(want.item(), abs=1e-5)
    theirs = {k: p.grad for k, p in reference.named_parameters() if p.grad is not None}
    assert_relative(grads, theirs, 1e-4)


BIASED = {"attention_bias": True, "mlp_bias": True}
FAMILIES: list[tuple[str, dict[str, Any]]] = [("llama", {}), ("llama", BIASED), ("qwen2", {}), ("mistral", {})]
each_family = pytest.mark.parametrize(("family", "more"), FAMILIES, ids=["llama", "biased", "qwen2", "mistral"])


@each_family
def test_each_family_served_is_its_plain_self(
    tmp_path: Path, tiny_model_dir: Path, kernels: Kernels, family: str, more: dict[str, Any]
) -> None:
    """Biases of q, k, v in Qwen2, of all layers in some Llamas; a window of 3 tokens in Mistral."""
    folder = tiny.build_family(tmp_path / "model", family, tiny_model_dir, **more)
    _, model = lora(folder)
    give_biases(model)
    ids = torch.arange(60) * 7 % 90 + 3
    rows = [
        Group((Example(tuple(part.tolist()), (1.0,) * len(part), i),)) for i, part in enumerate(ids.split([9, 30, 21]))
    ]
    want, want_grads = step(Policy(model), rows)
    got, grads = step(fast(model, kernels), rows)
    assert got == pytest.approx(want, abs=1e-5)
    assert_relative(grads, want_grads, 1e-4)


@pytest.mark.parametrize("choice", ["selective", "full"])
def test_what_is_computed_again_is_the_same(
    tiny_model_dir: Path, groups: list[Group], kernels: Kernels, choice: str
) -> None:
    _, model = lora(tiny_model_dir)
    policy = fast(model, kernels)
    want, want_grads = step(policy, groups)
    policy.set_checkpointing(choice)
    got, grads = step(policy, groups)
    assert got == want
    assert all(torch.equal(grads[k], want_grads[k]) for k in want_grads)


def test_any_cut_of_a_step_is_the_whole_step(tiny_model_dir: Path, groups: list[Group], kernels: Kernels) -> None:
    _, model = lora(tiny_model_dir)
    policy = fast(model, kernels)
    want, want_grads = step(policy, groups)
    for budget in (1, 100, 200):
        got, grads = step(policy, groups, budget)
        assert got == pytest.approx(want, abs=1e-6)
        assert_relative(grads, want_grads, 1e-5)


@pytest.mark.parametrize("wanted", ["some", "no"])
@pytest.mark.parametrize("choice", ["none", "full"])
@pytest.mark.parametrize("kind", ["low rank", "full", "tiles"])
def test_some_rows_are_those_of_all_rows(
    request: pytest.FixtureRequest,
    tiny_model_dir: Path,
    groups: list[Group],
    kernels: Kernels,
    kind: str,
    choice: str,
    wanted: str,
) -> None:
    """The last layer computes less where few tokens are wanted: first, last and some of both halves of the pack, or
    none, when a micro-batch has nothing to train on."""
    if kind == "tiles":
        policy = fast(rounded(request.getfixturevalue("tiled"))[0], kernels, torch.bfloat16)
        assert policy.fast.tiles  # type: ignore[union-attr]
    else:
        policy = fast(full(tiny_model_dir) if kind == "full" else lora(tiny_model_dir)[1], kernels)
    policy.set_checkpointing(choice)
    batch = collate(groups)
    few_rows = [0, *range(5, batch.n_tokens - 40, 9), batch.n_tokens - 1]
    rows = torch.tensor(few_rows if wanted == "some" else [], dtype=torch.int64)
    g_ND = torch.randn(len(rows), 1, generator=torch.Generator().manual_seed(1))
    found = []
    for some in (True, False):
        policy.model.zero_grad(set_to_none=True)
        h_ND = policy.hidden(batch, rows) if some else policy.hidden(batch)[rows]
        (h_ND.float() * g_ND).sum().backward()
        grads = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
        found.append((h_ND.detach().float(), grads))
    (few, few_grads), (all_, all_grads) = found
    loose = 0.02 if kind == "tiles" else 1e-5
    torch.testing.assert_close(few, all_, rtol=loose, atol=loose)
    assert few_grads.keys() == all_grads.keys()
    for name, want in all_grads.items():
        assert float((few_grads[name] - want).norm()) <= loose * float(want.norm()) + 1e-7, name


def test_off_is_the_base_and_on_again_the_adapter(tiny_model_dir: Path, groups: list[Group], kernels: Kernels) -> None:
    tuner, model = lora(tiny_model_dir)
    policy, batch = fast(model, kernels), collate(groups)
    with torch.no_grad():
        on = policy.hidden(batch)
        with tuner.off():
            off = policy.hidden(batch)
        base = Policy(load_model(tiny_model_dir)).hidden(batch)
        torch.testing.assert_close(off, base, atol=1e-5, rtol=1e-5)
        assert torch.equal(policy.hidden(batch), on)
        assert not torch.allclose(on, off, atol=1e-3)


def test_a_pass_of_the_base_before_the_backward(tiny_model_dir: Path, groups: list[Group], kernels: Kernels) -> None:
    """As for a reference model: the adapter is off in between, and its gradient the same."""
    tuner, model = lora(tiny_model_dir)
    policy, batch = fast(model, kernels), collate(groups)
    policy.hidden(batch).square().sum().backward()
    want = {k: p.grad.clone() for k, p in tuner.trainable().items() if p.grad is not None}
    model.zero_grad()
    loss = policy.hidden(batch).square().sum()
    with tuner.off(), torch.no_grad():
        policy.hidden(batch)
    loss.backward()
    assert all(torch.equal(p.grad, want[k]) for k, p in tuner.trainable().items())  # type: ignore[arg-type]


def test_what_cannot_be_right_is_refused(tiny_model_dir: Path, groups: list[Group], kernels: Kernels) -> None:
    tuner, model = lora(tiny_model_dir)
    loss = fast(model, kernels).hidden(collate(groups)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward only"):
        loss.backward()
    loss = fast(model, kernels).hidden(collate(groups)).sum()
    with torch.no_grad():
        next(iter(tuner.trainable().values())).add_(1)
    with pytest.raises(RuntimeError, match="changed between"):
        loss.backward()


def test_weights_that_an_optimizer_moved_are_read_again(
    tiny_model_dir: Path, groups: list[Group], kernels: Kernels
) -> None:
    tuner, model = lora(tiny_model_dir)
    policy = fast(model, kernels)
    optimizer = torch.optim.SGD(tuner.trainable().values(), lr=0.1)
    objective, batch = SFT(SFT.Options()), collate(groups)
    for _ in range(3):
        objective(policy, batch)["loss"].total.div(batch.weights_T.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch.testing.assert_close(policy.hidden(batch), Policy(model).hidden(batch), atol=1e-5, rtol=1e-5)


@pytest.fixture
def tiled(tmp_path: Path, kernels: Kernels) -> Path:
    if not kernels.tiles:
        pytest.skip("this processor has no AMX tiles")
    return tiny.build_tiny_model(tmp_path / "tiled", **tiny.TILED)


def rounded(folder: Path) -> tuple[nn.Module, nn.Module]:
    """The same LoRA model twice, its base rounded to bfloat16: in bfloat16, and in float32 as the exact reference."""
    (_, half), (_, exact) = lora(folder, torch.bfloat16), lora(folder)
    with torch.no_grad():
        for a, b in zip(exact.parameters(), half.parameters(), strict=True):
            a.copy_(b)
    return half, exact


def error(found: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Of all gradients together, relative."""
    off = sum(float((found[k] - want[k]).square().sum()) for k in want)
    return (off / sum(float(g.square().sum()) for g in want.values())) ** 0.5


def test_on_tiles_the_error_is_that_of_rounding(tiled: Path, groups: list[Group], kernels: Kernels) -> None:
    """Against float32 with the same rounded weights; the plain bfloat16 modules are no nearer."""
    half, exact = rounded(tiled)
    policy = fast(half, kernels, torch.bfloat16)
    assert policy.fast.tiles and policy.fast.head is not None  # type: ignore[union-attr]
    want, want_grads = step(Policy(exact), groups)
    got, grads = step(policy, groups)
    plain, plain_grads = step(Policy(half, torch.bfloat16), groups)
    assert abs(got - want) <= 0.002 * want
    assert error(grads, want_grads) <= 0.03
    assert error(grads, want_grads) <= 1.5 * error(plain_grads, want_grads)
    assert abs(plain - want) <= 0.01 * want


@each_family
def test_each_family_on_tiles(
    tmp_path: Path, tiny_model_dir: Path, kernels: Kernels, family: str, more: dict[str, Any]
) -> None:
    """Biases of q, k, v and a sliding window, in the calls that do a whole layer; checkpointing gives the same bits."""
    if not kernels.tiles:
        pytest.skip("this processor has no AMX tiles")
    calm = {**tiny.TILED, "initializer_range": 0.05, **more}  # else rounding is all that is seen
    half, exact = (lora(tiny.build_family(tmp_path / d, family, tiny_model_dir, **calm), dtype)[1]
                   for d, dtype in (("half", torch.bfloat16), ("exact", torch.float32)))  # fmt: skip
    give_biases(half)
    with torch.no_grad():
        for a, b in zip(exact.parameters(), half.parameters(), strict=True):
            a.copy_(b)
    rows = [Group((Example(tuple(range(3, 3 + n)), (1.0,) * n, n),)) for n in (9, 30, 21)]
    policy = fast(half, kernels, torch.bfloat16)
    want, want_grads = step(Policy(exact), rows)
    got, grads = step(policy, rows)
    assert got == pytest.approx(want, rel=0.005)
    plain = error(step(Policy(half, torch.bfloat16), rows)[1], want_grads)
    assert error(grads, want_grads) <= 1.5 * plain <= 0.15
    policy.set_checkpointing("full")
    again, same = step(policy, rows)
    assert again == got and all(torch.equal(same[k], grads[k]) for k in grads)


def test_on_tiles_packed_is_alone_and_again_is_the_same(tiled: Path, groups: list[Group], kernels: Kernels) -> None:
    half, _ = rounded(tiled)
    policy = fast(half, kernels, torch.bfloat16)
    with torch.no_grad():
        packed = policy.hidden(collate(groups)).split([g.n_tokens for g in groups])
        for rows, group in zip(packed, groups, strict=True):
            alone = policy.hidden(collate([group]))
            assert (rows - alone).float().norm() <= 0.01 * alone.float().norm()
    first, second = step(policy, groups), step(policy, groups)
    assert first[0] == second[0]
    assert all(torch.equal(first[1][k], second[1][k]) for k in first[1])


def full(folder: Path) -> nn.Module:
    return Full(Full.Options()).attach(load_model(folder), 0)


def test_full_tuning_is_that_of_transformers(tiny_model_dir: Path, groups: list[Group], kernels: Kernels) -> None:
    reference = plain_model(tiny_model_dir)
    want = plain_loss(reference, groups)
    want.backward()
    loss, grads = step(fast(full(tiny_model_dir), kernels), groups)
    assert loss == pytest.approx(want.item(), abs=1e-5)
    assert_relative(grads, {k: p.grad for k, p in reference.named_parameters() if p.grad is not None}, 1e-4)


@each_family
def test_full_tuning_of_each_family_served(
    tmp_path: Path, tiny_model_dir: Path, kernels: Kernels, family: str, more: dict[str, Any]
) -> None:
    """Trained biases; heads that are not tied to the embeddings."""
    model = full(tiny.build_family(tmp_path / "model", family, tiny_model_dir, **more))
    give_biases(model)
    rows = [Group((Example(tuple(range(3, 3 + n)), (1.0,) * n, n),)) for n in (9, 30, 21)]
    want, want_grads = step(Policy(model), rows)
    got, grads = step(fast(model, kernels), rows)
    assert got == pytest.approx(want, abs=1e-5)
    assert_relative(grads, want_grads, 1e-4)


def test_what_was_loaded_and_frozen_before_the_first_step_is_read(
    tiny_model_dir: Path, groups: list[Group], kernels: Kernels
) -> None:
    """As half fine-tuning resumes: a checkpoint comes after the path was chosen, then the round's half is frozen."""
    model = full(tiny_model_dir)
    policy = fast(model, kernels)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 9 == 0)
    want, want_grads = step(Policy(model), groups)
    got, grads = step(policy, groups)
    assert got == pytest.approx(want, abs=1e-5)
    assert_relative(grads, want_grads, 1e-4)


def test_only_the_upper_layers(tiny_model_dir: Path, groups: list[Group], kernels: Kernels) -> None:
    """Some weights of one product, one norm; nothing below is run backward."""
    model = full(tiny_model_dir).requires_grad_(False)
    upper: Any = model.model.layers[1]  # type: ignore[union-attr,index]
    for p in (upper.self_attn.k_proj.weight, upper.mlp.up_proj.weight, upper.input_layernorm.weight):
        p.requires_grad_(True)
    want, want_grads = step(Policy(model), groups)
    policy = fast(model, kernels)
    got, grads = step(policy, groups)
    assert policy.fast.lowest() == 1  # type: ignore[union-attr]
    assert got == pytest.approx(want, abs=1e-5)
    assert_relative(grads, want_grads, 1e-4)


@pytest.mark.parametrize(("name", "family"), [("half", "llama"), ("half", "qwen2"), ("bitfit", "qwen2")])
def test_no_gradient_is_computed_that_nobody_needs(
    tmp_path: Path, tiny_model_dir: Path, kernels: Kernels, monkeypatch: pytest.MonkeyPatch, name: str, family: str
) -> None:
    """Another half trains in each round; what was frozen keeps the values that its last update left."""
    part: Any = TUNERS.load(name)
    tuner = part(part.Options(**({"round_steps": 1} if name == "half" else {})))
    model = tuner.attach(load_model(tiny.build_family(tmp_path / "model", family, tiny_model_dir)), 0)
    rows = [Group((Example(tuple(range(3, 3 + n)), (1.0,) * n, n),)) for n in (9, 30, 21)]
    policy, made = fast(model, kernels), list[tuple[int, ...]]()
    real = TorchProduct.weight_gradient

    def seen(self: Any, i: int, x: Tensor, dy: Tensor) -> Tensor:
        made.append(real(self, i, x, dy).shape)
        return real(self, i, x, dy)

    monkeypatch.setattr(TorchProduct, "weight_gradient", seen)
    optimizer = torch.optim.SGD(tuner.trainable().values(), lr=0.1)
    for number in (1, 2, 3):
        tuner.before_step(number)
        want, want_grads = step(Policy(model), rows)
        made.clear()
        got, grads = step(policy, rows)
        assert got == pytest.approx(want, abs=1e-5)
        assert_relative(grads, want_grads, 1e-4)
        assert len(made) == sum("_proj.weight" in k for k in grads)
        for k, p in tuner.trainable().items():
            p.grad = grads.get(k)
        tuner.update(optimizer, number)
        optimizer.zero_grad()


def test_full_tuning_on_tiles_follows_float32(tiled: Path, groups: list[Group], kernels: Kernels) -> None:
    """Ten steps with the same optimizer: the weights are packed anew after each."""
    losses: dict[str, list[float]] = {}
    for name, dtype in {"exact": torch.float32, "tiles": torch.bfloat16}.items():
        model = full(tiled)
        policy = fast(model, kernels, dtype) if name == "tiles" else Policy(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        losses[name] = []
        for i in range(10):
            batch = collate(groups[i % 3 :: 2])
            loss = SFT(SFT.Options())(policy, batch)["loss"].total / batch.weights_T.sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())
    assert losses["tiles"] == pytest.approx(losses["exact"], rel=0.02)
    assert losses["exact"][-1] < 0.9 * losses["exact"][0]


Change = Callable[[nn.Module], None]


def _dropout(model: nn.Module) -> None:
    for layer in model.modules():
        if hasattr(layer, "lora_dropout"):
            layer.lora_dropout["default"] = nn.Dropout(0.1)  # type: ignore[index]


def _more(model: nn.Module) -> None:
    model.prompt = nn.Parameter(torch.zeros(1))  # type: ignore[assignment]


@pytest.mark.parametrize(("change", "reason"), [(_dropout, "has dropout"), (_more, "prompt is trained")])
def test_what_it_does_not_serve_is_told(tiny_model_dir: Path, change: Change, reason: str) -> None:
    _, model = lora(tiny_model_dir)
    change(model)
    assert reason in (why_not(model, torch.float32) or "")


def test_hidden_states_that_the_plain_modules_made_take_the_plain_head(
    tiled: Path, groups: list[Group], kernels: Kernels
) -> None:
    """With embedding noise the modules run, in float32 under autocast: not what the tiles of the head read."""
    model = full(tiled)
    policy = fast(model, kernels, torch.bfloat16)
    want, want_grads = step(policy, groups)
    quiet = replace(collate(groups), noise_T=torch.zeros(sum(g.n_tokens for g in groups), dtype=torch.int64))
    policy.embedding_noise = lambda batch: torch.zeros(batch.n_tokens, model.config.hidden_size)  # type: ignore[union-attr]
    loss = SFT(SFT.Options())(policy, quiet)["loss"].total / quiet.weights_T.sum()
    loss.backward()
    assert loss.item() == pytest.approx(want, rel=0.01)
    got = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    size = sum(float(g.square().sum()) for g in want_grads.values())
    assert sum(float((got[k] - want_grads[k]).square().sum()) for k in want_grads) <= 0.05**2 * size


@pytest.mark.parametrize(
    ("wanted", "room", "name", "why"),
    [
        ("auto", 1e9, "fast", "fast path runs"),
        ("plain", 1e9, "plain", "asked or decided"),
        ("auto", 1e5, "plain", "its copy of the weights would take"),
    ],
)
def test_the_path_is_chosen_and_told(
    tiny_model_dir: Path, kernels: Kernels, wanted: str, room: float, name: str, why: str
) -> None:
    _, model = lora(tiny_model_dir)
    chosen = choose_path(model, torch.float32, 1, tiny.KERNELS, wanted, room)
    assert (chosen.name, chosen.forward is None) == (name, name == "plain") and why in chosen.why
