"""DyLoRA's own: the paper's formula in float64, what a step leaves alone, and adapters cut to every rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tunewright.core.errors import SpecError
from tunewright.models.loader import load_model
from tunewright.tuners.dora import DoRA
from tunewright.tuners.dylora import DyLoRA, truncate

IDS = torch.tensor([[5, 17, 300, 41, 8, 77, 12, 250]])
R = 6


def attached(folder: Path, **options: Any) -> tuple[DyLoRA, nn.Module]:
    """With B away from zero, so that every rank counts."""
    tuner = DyLoRA(DyLoRA.Options(r=R, **options))
    model = tuner.attach(load_model(folder), 3)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in tuner.trainable().items():
            if "lora_B" in name:
                p.add_(0.05 * torch.randn(p.shape, generator=g))
    return tuner, model


def layer_of(model: nn.Module) -> Any:
    return model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")


@pytest.mark.parametrize("step", range(1, 6))
def test_a_step_is_the_paper_s_formula(tiny_model_dir: Path, step: int) -> None:
    """Forward and gradients of W x + (alpha / b) B[:, :b] A[:b] x, arXiv 2210.07558, equations 6 to 8, in float64."""
    tuner, model = attached(tiny_model_dir)
    layer, b = layer_of(model), tuner.rank(step)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    w, a_, b_ = (t.detach().double().clone() for t in (layer.base_layer.weight, down, up))
    g = torch.Generator().manual_seed(step)
    x, dy = torch.randn(9, 64, generator=g), torch.randn(9, 128, generator=g)
    tuner.before_step(step)
    y = layer(x)
    (y * dy).sum().backward()
    tuner.on_gradients(step)
    a_.requires_grad_(True)
    b_.requires_grad_(True)
    wanted = x.double() @ w.T + tuner.options.alpha / b * (x.double() @ a_[:b].T) @ b_[:, :b].T
    (wanted * dy.double()).sum().backward()
    torch.testing.assert_close(y.double(), wanted, atol=1e-5, rtol=1e-5)
    for p, q in ((down, a_), (up, b_)):
        assert q.grad is not None
        torch.testing.assert_close(p.grad.double(), q.grad, atol=1e-4, rtol=1e-5)
        assert torch.equal(p.double(), q)  # whole again


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_changes_its_ranks_and_no_other(tiny_model_dir: Path, frozen: bool) -> None:
    """With momentum of earlier steps and weight decay, which would move everything."""
    tuner, model = attached(tiny_model_dir, frozen=frozen)
    layer = layer_of(model)
    optimizer = torch.optim.AdamW(tuner.trainable().values(), lr=0.01, weight_decay=0.1)
    seen = set()
    for step in range(1, 9):
        a, b = (getattr(layer, f"lora_{x}")["default"].weight.detach().clone() for x in "AB")
        optimizer.zero_grad()
        tuner.before_step(step)
        model(IDS).logits.square().mean().backward()
        tuner.on_gradients(step)
        tuner.update(optimizer, step)
        tuner.after_step(step)
        rank = tuner.rank(step)
        first = rank - 1 if frozen else 0
        moved = [bool((layer.lora_A["default"].weight[i] != a[i]).any()) for i in range(R)]
        assert moved == [first <= i < rank for i in range(R)]
        assert [bool((layer.lora_B["default"].weight[:, i] != b[:, i]).any()) for i in range(R)] == moved
        seen.add(rank)
    assert len(seen) > 3


def test_a_step_that_is_begun_again_or_skipped_leaves_everything_whole(tiny_model_dir: Path) -> None:
    tuner, _ = attached(tiny_model_dir)
    before = {k: p.detach().clone() for k, p in tuner.trainable().items()}
    tuner.before_step(1)
    tuner.before_step(1)
    for p in tuner.trainable().values():
        p.grad = torch.zeros_like(p)
    tuner.on_gradients(1)
    tuner.before_step(2)
    tuner.on_gradients(2)
    assert all(torch.equal(p, before[k]) for k, p in tuner.trainable().items())


def test_ranks_are_a_function_of_seed_and_step_and_all_occur(tiny_model_dir: Path) -> None:
    tuner, _ = attached(tiny_model_dir, lowest=2)
    drawn = [tuner.rank(s) for s in range(1, 200)]
    assert drawn == [tuner.rank(s) for s in range(1, 200)]
    assert {*drawn} == {2, 3, 4, 5, 6}


@pytest.mark.parametrize("k", [1, 4, R])
def test_a_cut_adapter_is_the_first_ranks(tiny_model_dir: Path, tmp_path: Path, k: int) -> None:
    """In plain peft: W + (alpha / k) B[:, :k] A[:k]."""
    tuner, model = attached(tiny_model_dir)
    (tmp_path / "cut").mkdir()
    tuner.save(tmp_path, str(tiny_model_dir))
    truncate(tmp_path, tmp_path / "cut", k)
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path / "cut")
    with torch.no_grad():
        for layer in tuner.layers:
            layer.lora_A["default"].weight[k:] = 0
            layer.scaling["default"] = tuner.options.alpha / k
        torch.testing.assert_close(opened.eval()(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "cut/adapter_config.json").read_text())["r"] == k


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, labels=ids).loss


@pytest.mark.slow
def test_every_rank_works_and_more_is_better(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Trained once, cut to each rank: every one beats the base, the highest beats the lowest, and LoRA cut as low."""
    from tunewright.tuners.lora import LoRA

    ids = torch.randint(5, 300, (1, 96), generator=torch.Generator().manual_seed(4))
    losses: dict[str, list[float]] = {}
    for tuner in (DyLoRA(DyLoRA.Options(r=R)), LoRA(LoRA.Options(r=R, alpha=16))):
        kind = type(tuner).__name__
        model = tuner.attach(load_model(tiny_model_dir), 0)
        optimizer = torch.optim.AdamW(tuner.trainable().values(), lr=5e-3)
        plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        base = loss_of(plain, ids).item()
        for step in range(1, 121):
            optimizer.zero_grad()
            tuner.before_step(step)
            loss_of(tuner.model.base_model.model, ids).backward()
            tuner.on_gradients(step)
            tuner.update(optimizer, step)
            tuner.after_step(step)
        assert model is tuner.model
        saved = tmp_path / kind
        saved.mkdir()
        tuner.save(saved, str(tiny_model_dir))
        losses[kind] = []
        for k in range(1, R + 1):
            cut = tmp_path / f"{kind}-{k}"
            cut.mkdir()
            truncate(saved, cut, k)
            opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), cut)
            losses[kind].append(loss_of(opened, ids).item())
        assert base > max(losses["DyLoRA"])
    assert losses["DyLoRA"][-1] < losses["DyLoRA"][0] < losses["LoRA"][0]


def test_what_cannot_be_cut_is_told(tiny_model_dir: Path, tmp_path: Path) -> None:
    attached(tiny_model_dir)[0].save(tmp_path, "base")
    for rank in (0, R + 1):
        with pytest.raises(SpecError, match=f"ranks from 1 to {R}"):
            truncate(tmp_path, tmp_path, rank)
    other = DoRA(DoRA.Options())
    other.attach(load_model(tiny_model_dir), 0)
    other.save(tmp_path, "base")
    with pytest.raises(SpecError, match="method dora; only LoRA"):
        truncate(tmp_path, tmp_path, 1)


def test_lowest_above_r_is_refused() -> None:
    with pytest.raises(ValidationError, match="lowest is 5, above r 4"):
        DyLoRA.Options(r=4, lowest=5)
