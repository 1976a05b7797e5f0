"""Every adapter on every kind of model: it starts as the base, learns, comes back from its files; or says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import groups_of, is_head, load, our_loss
from torch import nn

import tiny
from tunewright.core.errors import SpecError
from tunewright.core.example import Group
from tunewright.models.policy import Policy
from tunewright.objectives.classify import Classify
from tunewright.objectives.sft import SFT
from tunewright.ops.packing import collate
from tunewright.tuners import TUNERS

pytestmark = [pytest.mark.slow, pytest.mark.nightly]
ADAPTERS = [name for name in TUNERS if TUNERS.load(name).card.artefact == "adapter"]
OPTIONS: dict[str, dict[str, Any]] = {"oft": {"block_size": 8}, "vera": {"r": 16}}
OPTIONS |= {name: {"virtual_tokens": 5} for name in ("prompt", "p_tuning", "prefix")}
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
# what a tuner cannot do, and how its error begins
REFUSED = {
    ("oft", "gpt2"): "tuner 'oft' cannot rotate",
    ("parallel", "bert"): "tuner 'parallel': no MLP was found",
    ("parallel", "roberta"): "tuner 'parallel': no MLP was found",
    **{("houlsby", moe): "tuner 'houlsby': no MLP output was found" for moe in MIXTURES},
    **{("pfeiffer", moe): "tuner 'pfeiffer': no MLP output was found" for moe in MIXTURES},
    **{("ia3", moe): "tuner 'ia3' does not know" for moe in MIXTURES},
    # this tiny one has another family's field in its config, and peft goes by it; test_soft_prompts.py has one without
    ("prefix", "gpt2"): "tuner 'prefix' cannot be used with a GPT2LMHeadModel",
}
SOFT = ("prompt", "p_tuning", "prefix")
WHY_NOT_SOFT = {
    "gemma2": "can only be run padded",
    "bloom": "can only be run padded",
    "t5": "is an encoder-decoder",
    "mt5": "is an encoder-decoder",
    "bert": "is an encoder",
    "roberta": "is an encoder",
}
REFUSED |= {(name, f): f"tuner '{name}' is for decoders .* {why}" for name in SOFT for f, why in WHY_NOT_SOFT.items()}


def loss(family: str, model: nn.Module, groups: list[Group]) -> float:
    objective: Any = Classify(Classify.Options()) if is_head(family) else SFT(SFT.Options())
    batch = collate(groups)
    return float(objective(Policy(model), batch)["loss"].total) / objective.weights(batch)["loss"]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_it_starts_as_the_base_learns_and_comes_back(built: Any, tmp_path: Path, family: str, name: str) -> None:
    part = TUNERS.load(name)
    tuner, groups = part(part.Options(**OPTIONS.get(name, {}))), groups_of(family)
    if (name, family) in REFUSED:
        with pytest.raises(SpecError, match=REFUSED[name, family]):
            tuner.attach(load(family, built(family)), 0)
        return
    base = load(family, built(family))
    before = our_loss(family, base, groups)
    model = tuner.attach(load(family, built(family)), 0)
    at_start = our_loss(family, model, groups)
    assert (at_start == pytest.approx(before, abs=1e-6)) == part.card.identity_at_start
    trained = tuner.trainable()
    model.zero_grad()
    optimizer = torch.optim.AdamW(trained.values(), lr=part.card.default_lr)
    for _ in range(6):
        our_loss(family, model, groups)
        optimizer.step()
        optimizer.zero_grad()
    after = our_loss(family, model, groups)
    assert all(p.grad is not None for p in trained.values())
    assert after < at_start
    with tuner.off(), torch.no_grad():
        assert loss(family, model, groups) == pytest.approx(before, abs=1e-6)
    tuner.save(tmp_path, "base")
    fresh = part(part.Options(**OPTIONS.get(name, {})))
    again = fresh.attach(load(family, built(family)), 5)
    fresh.load(tmp_path)
    assert our_loss(family, again, groups) == pytest.approx(after, abs=1e-6)
