"""Preferences on the fast path: shared prompts in the kernels, the adapter off for the reference, exact gradients."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from plain import assert_relative, lora, plain_model
from torch import Tensor, nn

import tiny
from tunewright.core.example import Example, Group
from tunewright.models.fast_llama import FastLlama
from tunewright.models.policy import Policy
from tunewright.objectives.dpo import DPO
from tunewright.ops.kernels import Kernels
from tunewright.ops.packing import pack
from tunewright.train.reference import Reference
from tunewright.tuners.base import Tuner

Step = tuple[float, dict[str, Tensor]]


def pairs(prompts: tuple[int, ...] = (9, 40, 1, 150, 22)) -> list[Group]:
    """Two answers of different lengths to prompts of these lengths; one pair has no prompt to share."""
    rng, made = random.Random(0), []
    for i, length in enumerate(prompts):
        prompt = [rng.randrange(3, 470) for _ in range(length)]
        examples = []
        for n in (rng.randint(1, 40), rng.randint(1, 40)):
            ids = (*prompt, *(rng.randrange(3, 470) for _ in range(n)))
            examples.append(Example(ids, (0.0,) * length + (1.0,) * n, source=i + 1))
        made.append(Group(tuple(examples), prefix=length))
    return made


def policy_of(model: nn.Module, kernels: Kernels | None, dtype: torch.dtype = torch.float32) -> Policy:
    forward = None if kernels is None else FastLlama(model, dtype, kernels)
    return Policy(model, None if dtype == torch.float32 else dtype, fast=forward)


def step(policy: Policy, tuner: Tuner, share: bool = True, tokens: int = 10**6) -> Step:
    """(loss, {parameter: gradient}) of DPO against the model with the adapter off."""
    objective = DPO(DPO.Options())
    objective.reference = Reference(policy, tuner.off)
    policy.model.zero_grad()
    loss = 0.0
    for batch in pack(pairs(), tokens, share=share):
        assert (batch.parent_S >= 0).any() == share or batch.n_groups == 1
        total = objective(policy, batch)["loss"].total / len(pairs())
        total.backward()
        loss += total.item()
    return loss, {k: p.grad.clone() for k, p in tuner.trainable().items() if p.grad is not None}


def theirs(folder: Path, adapter: Path) -> Step:
    """The same of transformers and peft: two forward passes of each whole answer, and the formula."""
    model = PeftModel.from_pretrained(plain_model(folder), adapter, is_trainable=True)

    def logp(example: Example) -> Tensor:
        ids = torch.tensor([example.ids])
        each = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), -1).gather(1, ids[0, 1:, None])[:, 0]
        return each[[w > 0 for w in example.weights[1:]]].sum()

    losses = []
    for group in pairs():
        own = [logp(e) for e in group.examples]
        with torch.no_grad(), model.disable_adapter():
            base = [logp(e) for e in group.examples]
        losses.append(-F.logsigmoid(0.1 * ((own[0] - base[0]) - (own[1] - base[1]))))
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("share", [True, False])
def test_a_step_is_that_of_transformers_and_peft(
    share: bool, tiny_model_dir: Path, kernels: Kernels, tmp_path: Path
) -> None:
    tuner, model = lora(tiny_model_dir)
    tuner.save(tmp_path, str(tiny_model_dir))
    loss, grads = step(policy_of(model, kernels), tuner, share)
    want, want_grads = theirs(tiny_model_dir, tmp_path)
    assert loss == pytest.approx(want, abs=1e-5) and abs(loss - 0.6931) > 0.01
    assert_relative(grads, want_grads, 1e-4)


def test_a_shared_prompt_and_any_cut_are_the_plain_modules_step(tiny_model_dir: Path, kernels: Kernels) -> None:
    tuner, model = lora(tiny_model_dir)
    want, want_grads = step(policy_of(model, None), tuner, share=False)
    policy = policy_of(model, kernels)
    assert policy.shares_prefixes
    for tokens in (1, 200, 10**6):
        loss, grads = step(policy, tuner, tokens=tokens)
        assert loss == pytest.approx(want, abs=1e-6)
        assert_relative(grads, want_grads, 1e-5)


@pytest.mark.parametrize("choice", ["selective", "full"])
def test_what_is_computed_again_is_the_same(tiny_model_dir: Path, kernels: Kernels, choice: str) -> None:
    tuner, model = lora(tiny_model_dir)
    policy = policy_of(model, kernels)
    want = step(policy, tuner)
    policy.set_checkpointing(choice)
    found = step(policy, tuner)
    assert found[0] == want[0]
    assert_relative(found[1], want[1], 1e-6)


def error(found: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Of all gradients together, relative."""
    off = sum(float((found[k] - want[k]).square().sum()) for k in want)
    return (off / sum(float(g.square().sum()) for g in want.values())) ** 0.5


def need_tiles(kernels: Kernels) -> None:
    if not kernels.tiles:
        pytest.skip("this processor has no AMX tiles")


def two(folder: Path) -> tuple[Any, Any]:
    """The same (tuner, model) in bfloat16, and in float32 with the same rounded weights."""
    half, exact = lora(folder, torch.bfloat16), lora(folder)
    with torch.no_grad():
        for a, b in zip(exact[1].parameters(), half[1].parameters(), strict=True):
            a.copy_(b)
    return half, exact


def test_on_tiles_the_error_is_that_of_rounding(tmp_path: Path, kernels: Kernels) -> None:
    """Shared prompts against float32 and whole rows; bfloat16 on whole rows is no nearer. Twice gives the same bits."""
    need_tiles(kernels)
    folder = tiny.build_tiny_model(tmp_path / "tiled", **{**tiny.TILED, "initializer_range": 0.05})
    (tuner, half), (exact_tuner, exact) = two(folder)
    policy = policy_of(half, kernels, torch.bfloat16)
    assert policy.fast.tiles and policy.shares_prefixes  # type: ignore[union-attr]
    want, want_grads = step(policy_of(exact, None), exact_tuner, share=False)
    got, grads = step(policy, tuner)
    plain, plain_grads = step(policy_of(half, None, torch.bfloat16), tuner, share=False)
    assert abs(got - want) <= max(2 * abs(plain - want), 0.01 * want)
    assert error(grads, want_grads) <= 1.5 * error(plain_grads, want_grads) <= 0.3
    again, same = step(policy, tuner)
    assert again == got and all(torch.equal(same[k], grads[k]) for k in grads)


def test_on_tiles_an_untouched_adapter_has_margin_0(tmp_path: Path, kernels: Kernels) -> None:
    """The product with a zero update is the product without one, to the bit."""
    need_tiles(kernels)
    folder = tiny.build_tiny_model(tmp_path / "tiled", **tiny.TILED)
    tuner, model = lora(folder, torch.bfloat16)
    with torch.no_grad():
        for name, p in tuner.trainable().items():
            if "lora_B" in name:
                p.zero_()
    objective, policy = DPO(DPO.Options()), policy_of(model, kernels, torch.bfloat16)
    objective.reference = Reference(policy, tuner.off)
    (batch,) = pack(pairs(), 10**6, share=True)
    terms = objective(policy, batch)
    assert terms["reward_margin"].total.item() == 0.0 and terms["chosen_reward"].total.item() == 0.0


def test_a_window_on_tiles_shares_nothing(tmp_path: Path, tiny_model_dir: Path, kernels: Kernels) -> None:
    need_tiles(kernels)
    folder = tiny.build_family(tmp_path / "m", "mistral", tiny_model_dir, **tiny.TILED)
    _, model = lora(folder, torch.bfloat16)
    assert not policy_of(model, kernels, torch.bfloat16).shares_prefixes
