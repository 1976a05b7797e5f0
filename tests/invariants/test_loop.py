"""The loop in one process: equal to a plain transformers + peft loop, the same however steps are cut, exact resume."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_kit import BATCH, EPOCHS, ROWS, losses, make_parts, resumed_is, weights_hash
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from tunewright.core import durable
from tunewright.core.errors import Diverged
from tunewright.train.checkpoint import State, load_newest
from tunewright.train.loop import Parts, train
from tunewright.train.plan import Plan, order


def test_equals_a_plain_transformers_and_peft_loop(tmp_path: Path, tiny_model_dir: Path, golden: Parts) -> None:
    """Every step's loss to 1e-5: the same rows padded in one batch, labels of -100, transformers' own loss."""
    parts, ours = golden, make_parts(tmp_path, tiny_model_dir)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config)
    theirs = {n: p for n, p in model.named_parameters() if p.requires_grad}
    mine = ours.tuner.trainable()
    assert theirs.keys() == mine.keys()
    with torch.no_grad():
        for name, p in theirs.items():
            p.copy_(mine[name])
    optimizer = torch.optim.AdamW(theirs.values(), lr=parts.plan.learning_rate, weight_decay=0.01)
    total = parts.plan.total_steps
    reference = []
    rates = get_linear_schedule_with_warmup(optimizer, 2, total).lr_lambdas[0]
    for step in range(1, total + 1):
        per_epoch = total // EPOCHS
        rows = order(5, (step - 1) // per_epoch, ROWS)[(step - 1) % per_epoch * BATCH :][:BATCH]
        examples = [parts.groups[i].examples[0] for i in rows]
        width = max(len(e.ids) for e in examples)
        ids = torch.tensor([[*e.ids, *[0] * (width - len(e.ids))] for e in examples])
        mask = torch.tensor([[1] * len(e.ids) + [0] * (width - len(e.ids)) for e in examples])
        labels = torch.tensor(
            [
                [t if w else -100 for t, w in zip(e.ids, e.weights, strict=True)] + [-100] * (width - len(e.ids))
                for e in examples
            ]
        )
        optimizer.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        optimizer.param_groups[0]["lr"] = parts.plan.learning_rate * (rates(step) if step <= 2 else rates(step - 1))
        optimizer.step()
        reference.append(loss.item())
    assert [row[1] for row in losses(parts)] == pytest.approx(reference, abs=1e-5)


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_any_cut_of_a_step_is_the_same_step(tmp_path: Path, tiny_model_dir: Path, golden: Parts, budget: int) -> None:
    cut = make_parts(tmp_path, tiny_model_dir)
    train(replace(cut, plan=replace(cut.plan, micro_batch_tokens=budget)), State())
    for a, b in zip(losses(golden), losses(cut), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


class Crash(BaseException):
    """Stands for the process's death inside this process."""


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_resume_is_exact_from_a_crash_at_a_file_operation_of_a_save(
    tmp_path: Path, tiny_model_dir: Path, golden: Parts, monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    """Stride 1: at every one of them."""
    expected, weights = losses(golden), weights_hash(golden)
    count = {"n": 0, "at": 0}
    rename, replace_ = os.rename, os.replace

    def crashing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            count["n"] += 1
            if count["n"] == count["at"]:
                raise Crash
            return function(*args)

        return call

    monkeypatch.setattr(durable.os, "rename", crashing(rename))
    monkeypatch.setattr(durable.os, "replace", crashing(replace_))
    points = 0
    while True:
        count.update(n=0, at=points + stride)
        folder = tmp_path / f"crash-{points}"
        parts = make_parts(folder, tiny_model_dir)
        try:
            train(parts, State())
            break
        except Crash:
            points += stride
        count["at"] = 0
        again = make_parts(folder, tiny_model_dir, attempt=2)
        state, _ = load_newest(again.run, again.tuner, again.optimizer, again.events)
        again.events.write("resumed", "", {"step": state.step})
        train(again, state)
        assert losses(again) == expected
        assert weights_hash(again) == weights
    assert points > 10


def test_a_stop_saves_and_the_next_attempt_is_exact(tmp_path: Path, tiny_model_dir: Path, golden: Parts) -> None:
    resumed_is(golden, partial(make_parts, tmp_path, tiny_model_dir))


def test_divergence_fails_with_the_rows(tmp_path: Path, tiny_model_dir: Path) -> None:
    parts = make_parts(tmp_path, tiny_model_dir)
    with torch.no_grad():
        next(iter(parts.tuner.trainable().values())).fill_(float("nan"))
    with pytest.raises(Diverged, match=r"rows \[\d+"):
        train(parts, State())


def test_plan_is_what_the_loop_obeys(tmp_path: Path, tiny_model_dir: Path) -> None:
    parts = make_parts(tmp_path, tiny_model_dir)
    state = train(parts, State())
    assert isinstance(parts.plan, Plan)
    assert (state.step, state.epoch) == (parts.plan.total_steps, EPOCHS)
    assert state.tokens == EPOCHS * sum(g.n_tokens for g in parts.groups)
    best = min((row[4], row[0]) for row in losses(parts) if row[4] is not None)
    assert state.best == {"step": best[1], "value": best[0]}
