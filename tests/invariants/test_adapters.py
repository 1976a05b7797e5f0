"""Every adapter in the table: peft's own numbers, any cut of a step, exact resume, served, a job from start to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_kit import losses, make_groups, make_parts, resumed_is
from peft import PeftModel
from plain import assert_relative, plain_loss, plain_model, shake, step
from torch import nn

import engine_kit as kit
from tunewright.core.errors import SpecError
from tunewright.core.home import Home
from tunewright.core.spec import Part as Chosen
from tunewright.engine.engine import Engine
from tunewright.models.fast_llama import FastLlama
from tunewright.models.fast_serves import why_not
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy
from tunewright.ops.kernels import Kernels
from tunewright.train.checkpoint import State
from tunewright.train.loop import Parts, train
from tunewright.train.run import row
from tunewright.tuners import TUNERS
from tunewright.tuners.base import Tuner
from tunewright.tuners.bottleneck import insert_saved, is_bottleneck

# small, so that a step takes milliseconds
SMALL: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "rslora": {"r": 4},
    "dora": {"r": 4},
    "adalora": {"r": 2, "initial_r": 4},
    "dylora": {"r": 4},
    "vera": {"r": 16},
    "oft": {"block_size": 8},
    "ia3": {},
    "houlsby": {"size": 8},
    "pfeiffer": {"size": 8},
    "parallel": {"size": 8},
    "prompt": {"virtual_tokens": 5},
    "p_tuning": {"virtual_tokens": 5, "hidden_size": 16},
    "prefix": {"virtual_tokens": 5},
}
ADAPTERS = [name for name in TUNERS if TUNERS.load(name).card.artefact == "adapter"]
OWN = ("houlsby", "pfeiffer", "parallel")
# low-rank products, factors of outputs, bottlenecks, virtual tokens
FAST = ("lora", "rslora", "dylora", "adalora", "dora", "vera", "oft", "ia3", "prompt", "p_tuning", "prefix", *OWN)
SOFT = ("prompt", "p_tuning", "prefix")  # peft opens them for use only: test_soft_prompts.py compares them
OF_PEFT = [name for name in SMALL if name not in (*OWN, *SOFT)]


def by_default(*names: str) -> Any:
    """Every adapter, those not named in the slower run only."""
    return pytest.mark.parametrize(
        "name", [n if n in names else pytest.param(n, marks=pytest.mark.slow) for n in ADAPTERS]
    )


def make(name: str, **options: Any) -> Tuner:
    part = TUNERS.load(name)
    return part(part.Options(**{**SMALL.get(name, {}), **options}))


def shaken(name: str, folder: Path, size: float = 0.05) -> tuple[Tuner, nn.Module]:
    tuner = make(name)
    return tuner, shake(tuner, folder, size)


def test_no_adapter_is_left_out() -> None:
    assert set(ADAPTERS) == set(SMALL)


@pytest.mark.parametrize("name", OF_PEFT)
def test_loss_and_gradients_are_peft_s(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The saved adapter in a plain peft model, rows padded, transformers' own loss."""
    tuner, model = shaken(name, tiny_model_dir)
    tuner.save(tmp_path, str(tiny_model_dir))
    reference = PeftModel.from_pretrained(plain_model(tiny_model_dir), tmp_path, is_trainable=True)
    wanted = plain_loss(reference, make_groups())
    if name == "adalora":  # peft adds its orthogonality to the loss; ours is apart, and the same
        penalty = tuner.penalty()
        assert penalty is not None
        penalty.backward()
        loss, grads = wanted.item() - penalty.item(), tuner.trainable()
        of_penalty = {k: 0.0 if p.grad is None else p.grad.clone() for k, p in grads.items()}
        model.zero_grad()
    else:
        loss, of_penalty = wanted.item(), dict.fromkeys(tuner.trainable(), 0.0)
    wanted.backward()
    theirs = {k: p.grad for k, p in reference.named_parameters() if p.grad is not None}
    got, grads = step(Policy(model), make_groups())
    assert got == pytest.approx(loss, abs=1e-5)
    assert_relative({k: g + of_penalty[k] for k, g in grads.items()}, theirs, 1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Callable[[str], Parts]:
    """trained(name) -> the parts of an uninterrupted training with that tuner, which changed nothing else."""

    @cache
    def run(name: str) -> Parts:
        parts = make_parts(tmp_path_factory.mktemp(name), tiny_model_dir, tuner=make(name))
        own = {id(p) for p in parts.tuner.trainable().values()}
        rest = {k: p.clone() for k, p in parts.policy.model.named_parameters() if id(p) not in own}
        train(parts, State())
        now = dict(parts.policy.model.named_parameters())
        assert all(torch.equal(p, now[k]) for k, p in rest.items())
        return parts

    return run


@by_default("adalora", "dylora")
def test_any_cut_of_a_step_is_the_same_step(
    trained: Callable[[str], Parts], tmp_path: Path, tiny_model_dir: Path, name: str
) -> None:
    cut = make_parts(tmp_path, tiny_model_dir, tuner=make(name))
    train(replace(cut, plan=replace(cut.plan, micro_batch_tokens=40)), State())
    for a, b in zip(losses(trained(name)), losses(cut), strict=True):
        assert a == pytest.approx(b, abs=2e-5)


@by_default("adalora", "dylora", "p_tuning")
def test_resume_is_exact_and_only_what_is_trained_changes(
    trained: Callable[[str], Parts], tmp_path: Path, tiny_model_dir: Path, name: str
) -> None:
    resumed_is(trained(name), lambda **more: make_parts(tmp_path, tiny_model_dir, tuner=make(name), **more))


@pytest.fixture(scope="module")
def engine(lively_home: Home) -> Engine:
    return Engine(lively_home, dtype="float32", threads=1)


@by_default("houlsby")
def test_each_is_served_beside_its_base(engine: Engine, model_dir: Path, tmp_path: Path, name: str) -> None:
    """Greedy answers are those of transformers over the same files, and the base's stay its own."""
    shaken(name, model_dir, 0.2)[0].save(tmp_path, kit.BASE)
    kit.write_artefact(tmp_path, "adapter", kit.BASE)
    base = kit.hf_model(model_dir)
    net = (
        insert_saved(kit.hf_model(model_dir), tmp_path)
        if is_bottleneck(tmp_path)
        else kit.hf_adapted(model_dir, tmp_path)
    )
    prompts = [kit.random_prompt(n, n) for n in (5, 40)]
    asked = [kit.ask(p, 20, artefact=str(tmp_path)) for p in prompts] + [kit.ask(p, 20) for p in prompts]
    wanted = [kit.reference(m, p, 20) for m in (net, base) for p in prompts]
    assert [kit.tokens(log) for log in kit.run_all(engine, asked, spread=2)] == wanted
    assert wanted[:2] != wanted[2:]


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_the_fast_path_takes(tiny_model_dir: Path, name: str) -> None:
    reason = why_not(make(name).attach(load_model(tiny_model_dir), 0), torch.float32)
    assert (reason is None) == (name in FAST), reason


@pytest.mark.parametrize("name", ["rslora", "dylora"])
def test_the_fast_path_says_what_the_plain_modules_say(tiny_model_dir: Path, kernels: Kernels, name: str) -> None:
    """In a step at each rank, too."""
    tuner, model = shaken(name, tiny_model_dir)
    fast, plain = Policy(model, fast=FastLlama(model, torch.float32, kernels)), Policy(model)
    groups = make_groups()
    for at in (1, 2, 3):
        tuner.before_step(at)
        (loss, grads), (wanted, theirs) = step(fast, groups), step(plain, groups)
        tuner.on_gradients(at)
        tuner.after_step(at)
        assert loss == pytest.approx(wanted, abs=1e-5)
        for key, g in theirs.items():
            assert (grads[key] - g).norm() <= 1e-4 * g.norm() + 1e-7, key


def test_options_that_do_not_go_together_are_one_clear_error() -> None:
    with pytest.raises(SpecError, match=r"^tuner 'dylora': lowest is 5, above r 4\.$"):
        row(TUNERS, Chosen(name="dylora", options={"r": 4, "lowest": 5}))


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_job_from_its_spec_to_its_result(tiny_home: Home, sft_file: Any, tmp_path: Path, name: str) -> None:
    from tunewright.core.events import EventWriter
    from tunewright.core.spec import parse_spec
    from tunewright.jobs.prepare import create_run
    from tunewright.train.run import run_job

    rows = sft_file(tmp_path, 12)
    tuner = {"name": name, **SMALL[name]}
    spec = {"model": "tiny", "training_file": str(rows), "tuner": tuner, "n_epochs": 2, "batch_size": 4, "seed": 1}
    run = create_run(tiny_home, parse_spec({**spec, "dtype": "float32", "threads": 1}), train_path=rows)
    end = run_job(run, tiny_home, EventWriter(run.attempt(1) / "events.jsonl", 1), lambda: False)
    assert end["status"] == "succeeded" and end["steps"] == 6
    plan = run.plan() or {}
    assert plan["path"] == ("fast" if name in FAST else "plain")
    assert plan["learning_rate"] == TUNERS.load(name).card.default_lr
    assert (run.result / "adapter_config.json").is_file()
    tuned = make(name)
    tuned.attach(load_model(tiny_home.models / "tiny"), 1)
    tuned.load(run.result)
