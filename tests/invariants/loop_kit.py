"""A small training in this process: its parts, what it said and left, and that a stopped one goes on exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunewright.core.durable import sha256_file
from tunewright.core.errors import Interrupted
from tunewright.core.events import EventWriter
from tunewright.core.example import Example, Group
from tunewright.core.run import Run
from tunewright.core.spec import parse_spec
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy
from tunewright.objectives.sft import SFT
from tunewright.ops.noise import neftune
from tunewright.ops.runtime import choose_dtype
from tunewright.train.checkpoint import State, load_newest
from tunewright.train.loop import Parts, train
from tunewright.train.optim import OPTIMIZERS
from tunewright.train.optim.schedules import Linear
from tunewright.train.plan import resolve
from tunewright.tuners.base import Tuner
from tunewright.tuners.lora import LoRA

EPOCHS, BATCH, ROWS = 2, 4, 10


def make_groups(n: int = ROWS) -> list[Group]:
    """Rows of different lengths, the first third of each not trained."""
    g = torch.Generator().manual_seed(3)
    groups = []
    for i in range(n):
        length = int(torch.randint(6, 40, (1,), generator=g))
        ids = torch.randint(5, 300, (length,), generator=g).tolist()
        groups.append(Group((Example(tuple(ids), tuple(float(k >= length // 3) for k in range(length)), i + 1),)))
    return groups


def make_parts(
    folder: Path,
    model_dir: Path,
    attempt: int = 1,
    stop: Callable[[], bool] = lambda: False,
    *,
    tuner: Tuner | None = None,
    optimizer: str = "adamw",
    dropout: float = 0.0,
    neftune_alpha: float = 0.0,
    dtype: str = "float32",
) -> Parts:
    spec = parse_spec(
        {
            "model": "tiny",
            "training_file": "f",
            "n_epochs": EPOCHS,
            "batch_size": BATCH,
            "seed": 5,
            "micro_batch_tokens": 64,
            "save_every_steps": 1,
            "eval_rows": 2,
        }
    )
    groups = make_groups()
    tuner = tuner or LoRA(LoRA.Options(r=4, alpha=8, dropout=dropout))
    torch_dtype = choose_dtype(dtype)
    model = tuner.attach(load_model(model_dir, torch_dtype), seed=5)
    plan = resolve(
        spec,
        groups,
        groups[:3],
        tuner.card,
        dtype=dtype,
        threads=1,
        context=512,
        parameters=1,
        trainable=1,
        versions={},
    )
    tuner.begin(plan.total_steps, plan.total_steps // EPOCHS)
    options = Linear.Options(warmup=2)
    rule = OPTIMIZERS.load(optimizer)
    run = Run(folder)

    def write_artefact(place: Path, state: State) -> None:
        place.mkdir()
        tuner.save(place, "tiny")

    return Parts(
        run=run,
        spec=spec,
        plan=plan,
        policy=Policy(
            model, None if torch_dtype == torch.float32 else torch_dtype, embedding_noise=neftune(model, neftune_alpha)
        ),
        tuner=tuner,
        objective=SFT(SFT.Options()),
        optimizer=rule.build(tuner.trainable(), plan.learning_rate, rule.Options(weight_decay=0.01)),
        rate=lambda s: plan.learning_rate * Linear.factor(s, plan.total_steps, options),
        groups=groups,
        valid=groups[:3],
        events=EventWriter(run.attempt(attempt) / "events.jsonl", attempt),
        write_artefact=write_artefact,
        stop=stop,
    )


def losses(parts: Parts) -> list[tuple[Any, ...]]:
    keys = ("step", "train_loss", "train_mean_token_accuracy", "grad_norm", "full_valid_loss")
    return [tuple(e.data.get(k) for k in keys) for e in parts.run.events() if e.type == "metrics"]


def weights_hash(parts: Parts) -> str:
    last = parts.run.checkpoint(parts.plan.total_steps) / "artefact" / "adapter_model.safetensors"
    return sha256_file(last)


def after(n: int) -> Callable[[], bool]:
    """Becomes true when it was asked more than n times."""
    asked = iter(range(n))
    return lambda: next(asked, None) is None


def resumed_is(golden: Parts, make: Callable[..., Parts]) -> None:
    """The same parts, stopped after three steps and continued: the same losses and weights as `golden`, bit for bit."""
    with pytest.raises(Interrupted):
        train(make(stop=after(3)), State())
    again = make(attempt=2)
    state, _ = load_newest(again.run, again.tuner, again.optimizer, again.events)
    assert 0 < state.step < again.plan.total_steps
    again.events.write("resumed", "", {"step": state.step})
    train(again, state)
    assert losses(again) == losses(golden)
    assert weights_hash(again) == weights_hash(golden)
