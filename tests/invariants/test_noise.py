"""With dropout and embedding noise on, a step still does not depend on its cut, and resume is exact; so for float16."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_kit import losses, make_parts, resumed_is

from tunewright.models.policy import Policy
from tunewright.ops import noise
from tunewright.ops.packing import collate
from tunewright.train import scaling
from tunewright.train.checkpoint import State
from tunewright.train.loop import Parts, train

BOTH = {"dropout": 0.3, "neftune_alpha": 5.0}
NOISES = [BOTH, *(pytest.param({name: BOTH[name]}, marks=pytest.mark.slow) for name in BOTH)]


@pytest.mark.parametrize("options", NOISES)
def test_any_cut_of_a_step_is_the_same_step(
    tmp_path: Path, tiny_model_dir: Path, golden: Parts, options: dict[str, Any]
) -> None:
    whole, cut = (make_parts(tmp_path / name, tiny_model_dir, **options) for name in "ab")
    train(replace(whole, plan=replace(whole.plan, micro_batch_tokens=10_000)), State())
    train(replace(cut, plan=replace(cut.plan, micro_batch_tokens=1)), State())
    for a, b in zip(losses(whole), losses(cut), strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    assert losses(golden)[-1] != pytest.approx(losses(whole)[-1], abs=1e-4)


def resumed_is_whole(folder: Path, model: Path, **options: Any) -> None:
    golden = make_parts(folder / "golden", model, **options)
    train(golden, State())
    resumed_is(golden, partial(make_parts, folder / "stopped", model, **options))


@pytest.mark.slow
def test_resume_is_exact_with_noise(tmp_path: Path, tiny_model_dir: Path) -> None:
    resumed_is_whole(tmp_path, tiny_model_dir, **BOTH)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adafactor", "lion", "muon", "sgd"])
def test_resume_is_exact_with_every_optimizer(tmp_path: Path, tiny_model_dir: Path, optimizer: str) -> None:
    resumed_is_whole(tmp_path, tiny_model_dir, optimizer=optimizer)


@pytest.mark.parametrize("choice", [pytest.param("selective", marks=pytest.mark.slow), "full"])
def test_layers_that_are_computed_again_draw_the_same_noise(tmp_path: Path, tiny_model_dir: Path, choice: str) -> None:
    plain, again = (make_parts(tmp_path / name, tiny_model_dir, dropout=0.3) for name in "ab")
    again.policy.set_checkpointing(choice)
    train(plain, State())
    train(again, State())
    assert losses(again) == losses(plain)


def test_validation_and_a_look_at_the_reference_have_no_noise(tmp_path: Path, tiny_model_dir: Path) -> None:
    parts = make_parts(tmp_path, tiny_model_dir, dropout=0.5, neftune_alpha=5.0)
    with torch.no_grad():
        for p in parts.tuner.trainable().values():
            p.add_(0.05)  # else B is zero and dropout has no effect
    batch = collate(parts.groups[:3])
    noisy = replace(batch, noise_T=noise.token_keys(batch, 0, 1))
    quiet = Policy(parts.policy.model)
    with torch.no_grad():
        expected = quiet.hidden(batch)
        assert torch.equal(parts.policy.hidden(noisy), expected)
    for policy in (quiet, parts.policy):
        with_dropout = policy.hidden(noisy)
        with torch.no_grad():
            assert torch.equal(policy.hidden(batch), expected)
        assert not torch.allclose(with_dropout, expected, atol=1e-2)
        assert torch.equal(policy.hidden(noisy), with_dropout)
        torch.testing.assert_close(policy.hidden(batch), expected)


@pytest.mark.slow
def test_float16_follows_float32_and_resumes_exactly(tmp_path: Path, tiny_model_dir: Path, golden: Parts) -> None:
    half = make_parts(tmp_path / "b", tiny_model_dir, dtype="float16")
    state = train(half, State())
    assert (state.loss_scale, state.well_scaled) == (scaling.FIRST, half.plan.total_steps)
    for a, b in zip(losses(golden), losses(half), strict=True):
        assert b[1] == pytest.approx(a[1], rel=0.01)
        assert b[3] == pytest.approx(a[3], rel=0.05)
    resumed_is_whole(tmp_path / "c", tiny_model_dir, dtype="float16")


def test_a_scale_that_overflows_is_halved_and_no_step_is_lost(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = make_parts(tmp_path / "a", tiny_model_dir, dtype="float16")
    train(usual, State())
    monkeypatch.setattr(scaling, "FIRST", 2.0**40)
    parts = make_parts(tmp_path / "b", tiny_model_dir, dtype="float16")
    state = train(parts, State())
    assert 2.0 < state.loss_scale < 2.0**30
    assert not [e for e in parts.run.events() if "skipped" in e.message]
    for a, b in zip(losses(usual), losses(parts), strict=True):
        assert b[1] == pytest.approx(a[1], rel=0.01)


def test_the_scale_grows_after_many_good_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "GROW_AFTER", 3)
    state = State()
    scaling.start(state, "float16")
    for _ in range(7):
        scaling.grow(state)
    assert (state.loss_scale, state.well_scaled) == (4 * scaling.FIRST, 1)
    plain = State()
    scaling.start(plain, "bfloat16")
    scaling.grow(plain)
    assert (plain.loss_scale, plain.well_scaled) == (1.0, 0)
