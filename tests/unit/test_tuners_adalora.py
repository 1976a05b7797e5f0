"""AdaLoRA's own: budget and scores are peft's, it ends at its budget, the file holds what is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from tunewright.core.errors import CheckpointError
from tunewright.models.loader import load_model
from tunewright.tuners.adalora import AdaLoRA

STEPS = 20


def attached(folder: Path, steps: int = STEPS, **options: Any) -> AdaLoRA:
    tuner = AdaLoRA(AdaLoRA.Options(**{"r": 2, "initial_r": 4, **options}))
    tuner.attach(load_model(folder), 0)
    tuner.begin(steps, steps)
    return tuner


def move(tuner: AdaLoRA, step: int) -> None:
    """A step on gradients drawn from its number, by plain gradient descent."""
    g = torch.Generator().manual_seed(step)
    for p in tuner.trainable().values():
        p.grad = torch.randn(p.shape, generator=g)
        p.data.sub_(0.05 * p.grad)
    tuner.after_step(step)


def theirs(tuner: AdaLoRA) -> tuple[nn.Module, RankAllocator]:
    """peft's allocator over a copy of the weights, with the same schedule."""
    model: Any = tuner.model.base_model.model
    config: Any = tuner.model.peft_config["default"]
    return model, RankAllocator(model, config, "default")


@pytest.mark.parametrize(("warmup", "final"), [(0.1, 0.3), (0.0, 0.0), (0.5, 0.4)])
def test_the_schedule_is_peft_s(tiny_model_dir: Path, warmup: float, final: float) -> None:
    """peft counts the last step before the final phase as total - tfinal; its total is one more where none is final."""
    tuner = attached(tiny_model_dir, 100, warmup=warmup, final=final)
    _, allocator = theirs(tuner)
    config: Any = tuner.model.peft_config["default"]
    config.total_step = tuner.last + config.tfinal
    assert [tuner.budget(s) for s in range(1, 101)] == [allocator.budget_schedule(s)[0] for s in range(1, 101)]


def test_scores_and_choices_are_peft_s(tiny_model_dir: Path) -> None:
    """Step by step while the budget shrinks: the same triplets are on."""
    tuner, other = attached(tiny_model_dir), attached(tiny_model_dir)
    model, allocator = theirs(other)
    config: Any = other.model.peft_config["default"]
    config.total_step = other.last + config.tfinal
    for step in range(1, other.last):
        move(tuner, step)
        g = torch.Generator().manual_seed(step)
        for p in other.trainable().values():
            p.grad = torch.randn(p.shape, generator=g)
            p.data.sub_(0.05 * p.grad)
        allocator.update_and_allocate(model, step)
        for name, p in other.trainable().items():
            mine = tuner.trainable()[name]
            assert torch.equal(p, mine), (step, name)
    scores = allocator.exp_avg_ipt
    for name, (mean, _) in tuner.scores.items():
        torch.testing.assert_close(mean, scores[name.removeprefix("base_model.model.")])


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
@pytest.mark.parametrize("every", [1, 7])
def test_it_ends_at_its_budget(tiny_model_dir: Path, tmp_path: Path, steps: int, every: int) -> None:
    tuner = attached(tiny_model_dir, steps, every=every)
    for step in range(1, steps + 1):
        move(tuner, step)
    ranks = tuner.ranks()
    assert sum(ranks.values()) == 2 * len(ranks) == 2 * 14
    if steps == 20:
        assert len(set(ranks.values())) > 1  # not simply the same for all
    tuner.save(tmp_path, "base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.shape[0] for k, t in tensors.items() if "lora_A" in k) == 28
    assert sum(t.shape[1] for k, t in tensors.items() if "lora_B" in k) == 28
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert sum(map(sum, pattern.values())) == 28


def test_what_is_off_stays_off_in_the_final_phase(tiny_model_dir: Path) -> None:
    tuner = attached(tiny_model_dir)
    for step in range(1, tuner.last + 1):
        move(tuner, step)
    ranks = tuner.ranks()
    for step in range(tuner.last + 1, STEPS + 1):
        move(tuner, step)
        assert tuner.ranks() == ranks


def test_a_skipped_last_step_is_made_up_for(tiny_model_dir: Path) -> None:
    tuner = attached(tiny_model_dir)
    for step in range(1, STEPS + 1):
        if step != tuner.last:
            move(tuner, step)
    assert sum(tuner.ranks().values()) == 28


def test_a_file_with_another_pattern_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    tuner = attached(tiny_model_dir)
    for step in range(1, STEPS + 1):
        move(tuner, step)
    tuner.save(tmp_path, "base")
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    first = next(iter(config["rank_pattern"]))
    config["rank_pattern"][first] = [True] * 9
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="rank_pattern"):
        attached(tiny_model_dir).load(tmp_path)


@pytest.mark.parametrize("options", [{"r": 13}, {"warmup": 0.6, "final": 0.5}, {"r": 0}, {"orthogonality": -1}])
def test_options_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AdaLoRA.Options(**options)
