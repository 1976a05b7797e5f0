"""The fast path of AdaLoRA, DoRA, IA3 and VeRA says what peft says: loss, gradients, off and on, on tiles. That of
bottlenecks and of added biases, which peft does not have, says what the plain modules say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from plain import assert_relative, fast, give_biases, plain_loss, plain_model, rows_to_groups, step, take_gradients
from torch import Tensor, nn

import tiny
from tunewright.core.example import Example, Group
from tunewright.models.fast_serves import why_not
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy
from tunewright.objectives.sft import SFT
from tunewright.ops.kernels import Kernels
from tunewright.ops.packing import collate
from tunewright.tuners import TUNERS
from tunewright.tuners.base import Tuner

NAMES = ("adalora", "dora", "ia3", "vera", "oft")
OWN = ("houlsby", "pfeiffer", "parallel", "bitfit")
NEEDED: dict[str, dict[str, Any]] = {"bitfit": {"add_biases": True}}
SOME: dict[str, dict[str, Any]] = {
    "adalora": {"target_modules": ["v_proj", "gate_proj", "down_proj"], "initial_r": 3, "r": 2},
    "dora": {"target_modules": ["q_proj", "up_proj", "o_proj"], "r": 3},
    "ia3": {"target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "oft": {"target_modules": ["q_proj", "gate_proj", "o_proj"], "block_size": 8, "exact": True},
    "vera": {"target_modules": ["k_proj", "up_proj", "down_proj"], "r": 5},
}


@pytest.fixture(scope="module")
def groups(tiny_model_dir: Path) -> list[Group]:
    return rows_to_groups(tiny_model_dir, tiny.sft_rows(7))


def tuned(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Tuner, nn.Module]:
    """A tuner whose every part has a gradient: nothing is where it starts. AdaLoRA's first triplet is off."""
    kind: Any = TUNERS.load(name)
    tuner = kind(kind.Options(**NEEDED.get(name, {}), **options))
    model = tuner.attach(load_model(folder, dtype), 0)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for k, p in tuner.trainable().items():
            p.mul_(1 + 0.2 * torch.randn(p.shape, generator=g)).add_(0.02 * torch.randn(p.shape, generator=g))
            if "lora_E" in k:
                p.add_(0.2)[0] = 0
    return tuner, model


@pytest.mark.parametrize("which", ["all", "some"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_that_of_transformers_and_peft(
    tiny_model_dir: Path, groups: list[Group], kernels: Kernels, tmp_path: Path, name: str, which: str
) -> None:
    """AdaLoRA's penalty included, which peft adds to the loss itself."""
    tuner, model = tuned(name, tiny_model_dir, **(SOME[name] if which == "some" else {}))
    tuner.save(tmp_path, str(tiny_model_dir))
    reference = PeftModel.from_pretrained(plain_model(tiny_model_dir), tmp_path, is_trainable=True)
    want = plain_loss(reference, groups)
    want.backward()
    loss, grads = step(fast(model, kernels), groups)
    penalty = tuner.penalty()
    if penalty is not None:
        penalty.backward()
        grads |= {k: grads[k] + more for k, more in take_gradients(model).items()}
        loss += penalty.item()
    assert loss == pytest.approx(want.item(), abs=1e-5)
    assert_relative(grads, {k: p.grad for k, p in reference.named_parameters() if p.grad is not None}, 1e-4)


@pytest.mark.parametrize("name", ["adalora", "dora", "vera", "oft", *OWN])
def test_biases_are_no_part_of_what_is_tuned(tmp_path: Path, tiny_model_dir: Path, kernels: Kernels, name: str) -> None:
    """Qwen2 has them on q, k and v: DoRA's lengths do not multiply them."""
    _, model = tuned(name, tiny.build_family(tmp_path / "model", "qwen2", tiny_model_dir))
    give_biases(model)
    rows = [Group((Example(tuple(range(3, 3 + n)), (1.0,) * n, n),)) for n in (9, 30, 21)]
    want, want_grads = step(Policy(model), rows)
    got, grads = step(fast(model, kernels), rows)
    assert got == pytest.approx(want, abs=1e-5)
    assert_relative(grads, want_grads, 1e-4)


@pytest.mark.parametrize("name", [*NAMES, *OWN])
def test_steps_off_and_on_follow_the_plain_modules(
    tiny_model_dir: Path, groups: list[Group], kernels: Kernels, name: str
) -> None:
    """What an optimizer moved is read again (DoRA's norms, AdaLoRA's E * A); off is the base; again the same bits."""
    tuner, model = tuned(name, tiny_model_dir)
    policy, base = fast(model, kernels), Policy(load_model(tiny_model_dir))
    optimizer = torch.optim.SGD(tuner.trainable().values(), lr=0.1)
    objective, batch = SFT(SFT.Options()), collate(groups)
    for _ in range(2):
        objective(policy, batch)["loss"].total.div(batch.weights_T.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            on = policy.hidden(batch)
            torch.testing.assert_close(on, Policy(model).hidden(batch), atol=2e-5, rtol=1e-5)
            with tuner.off():
                torch.testing.assert_close(policy.hidden(batch), base.hidden(batch), atol=1e-5, rtol=1e-5)
            assert torch.equal(policy.hidden(batch), on)
    want, want_grads = step(policy, groups)
    policy.set_checkpointing("full")
    got, grads = step(policy, groups)
    assert got == want and all(torch.equal(grads[k], want_grads[k]) for k in want_grads)


def error(found: dict[str, Tensor], want: dict[str, Tensor], like: str) -> float:
    """Of all gradients whose names hold `like`, together, relative."""
    names = [k for k in want if like in k]
    off = sum(float((found[k] - want[k]).square().sum()) for k in names)
    return (off / sum(float(want[k].square().sum()) for k in names)) ** 0.5


@pytest.mark.parametrize(
    ("name", "family"),
    # IA3 over biases runs the plain modules
    [(name, family) for name in (*NAMES, *OWN) for family in ("llama", "qwen2") if (name, family) != ("ia3", "qwen2")],
)
def test_on_tiles_the_error_is_that_of_rounding(
    tmp_path: Path, tiny_model_dir: Path, kernels: Kernels, name: str, family: str
) -> None:
    """Against float32 with the same rounded weights: no further from it than the plain bfloat16 modules; of the numbers
    on their own, too. What is computed again has the same bits."""
    if not kernels.tiles:
        pytest.skip("this processor has no AMX tiles")
    calm = {**tiny.TILED, "initializer_range": 0.05}  # else rounding is all that is seen
    folder = tiny.build_family(tmp_path / "model", family, tiny_model_dir, **calm)
    half, exact = (tuned(name, folder, dtype)[1] for dtype in (torch.bfloat16, torch.float32))
    give_biases(half)
    with torch.no_grad():
        for a, b in zip(exact.parameters(), half.parameters(), strict=True):
            a.copy_(b)
        for a, b in zip(exact.modules(), half.modules(), strict=True):
            if hasattr(a, "square"):  # the lengths that DoRA starts from
                a.square = b.square  # type: ignore[assignment]
    # half of the tokens are trained: the last layer runs kernel by kernel, the others as one call
    trained = {n: tuple(float(i > n / 2) for i in range(n)) for n in (60, 30, 21)}
    rows = [Group((Example(tuple(range(3, 3 + n)), weights, n),)) for n, weights in trained.items()]
    policy = fast(half, kernels, torch.bfloat16)
    want, want_grads = step(Policy(exact), rows)
    got, grads = step(policy, rows)
    plain_grads = step(Policy(half, torch.bfloat16), rows)[1]
    assert got == pytest.approx(want, rel=0.005)
    for kind in ("", "lora_E", "magnitude", "ia3_l", "lambda_d", "lambda_b", "_down", "_up", "bias", "oft_R"):
        if any(kind in k for k in want_grads):
            assert error(grads, want_grads, kind) <= 1.5 * error(plain_grads, want_grads, kind) <= 0.15, kind
    policy.set_checkpointing("full")
    again, same = step(policy, rows)
    assert again == got and all(torch.equal(same[k], grads[k]) for k in grads)


def _scaled_inputs(folder: Path) -> nn.Module:
    return tuned("ia3", folder, target_modules=["o_proj"], feedforward_modules=["o_proj"])[1]


def _trained_below(folder: Path) -> nn.Module:
    model = tuned("dora", folder)[1]
    model.get_base_model().model.layers[0].mlp.up_proj.get_base_layer().weight.requires_grad_(True)  # type: ignore[operator,union-attr,index]
    return model


def _lengths_beside_biases(folder: Path) -> nn.Module:
    model = tuned("dora", folder)[1]
    layer = model.get_base_model().model.layers[0].mlp.up_proj.get_base_layer()  # type: ignore[operator,union-attr,index]
    layer.bias = nn.Parameter(torch.ones(layer.out_features), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_scaled_inputs, "not the MLP's inner side"),
        (_trained_below, "weights that are trained"),
        (_lengths_beside_biases, "biases beside factors"),
    ],
)
def test_what_it_does_not_serve_is_told(tiny_model_dir: Path, make: Callable[[Path], nn.Module], reason: str) -> None:
    assert reason in (why_not(make(tiny_model_dir), torch.float32) or "")


def test_a_scaled_bias_is_told(tmp_path: Path, tiny_model_dir: Path) -> None:
    _, model = tuned("ia3", tiny.build_family(tmp_path / "model", "qwen2", tiny_model_dir))
    assert "a bias that is scaled" in (why_not(model, torch.float32) or "")
