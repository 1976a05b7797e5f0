"""Our numbers against transformers and peft used plainly: padding, masks, labels of -100, eager attention, float32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from plain import assert_relative, lora, our_step, padded, plain_loss, plain_model, rows_to_groups, take_gradients
from torch import Tensor

import tiny
from tunewright.core.example import Group
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy, head_of
from tunewright.objectives.sft import SFT
from tunewright.ops.packing import collate, pack
from tunewright.tuners.full import Full
from tunewright.tuners.lora import LoRA


@pytest.fixture(scope="module")
def groups(tiny_model_dir: Path) -> list[Group]:
    return rows_to_groups(tiny_model_dir, tiny.sft_rows(7))


def check_lora_step(folder: Path, groups: list[Group], where: Path) -> None:
    """Loss to 1e-5 and every LoRA gradient to 1e-4 relative, against peft over transformers with padding."""
    tuner, model = lora(folder)
    tuner.save(where, str(folder))
    reference = PeftModel.from_pretrained(plain_model(folder), where, is_trainable=True)
    expected = plain_loss(reference, groups)
    expected.backward()
    assert our_step(Policy(model), groups) == pytest.approx(expected.item(), abs=1e-5)
    assert_relative(take_gradients(model), take_gradients(reference), 1e-4)


def test_lora_step_is_that_of_transformers_and_peft(tiny_model_dir: Path, groups: list[Group], tmp_path: Path) -> None:
    check_lora_step(tiny_model_dir, groups, tmp_path)


def test_full_step_is_that_of_transformers(tiny_model_dir: Path, groups: list[Group]) -> None:
    tuner = Full(Full.Options())
    model = tuner.attach(load_model(tiny_model_dir), 0)
    reference = plain_model(tiny_model_dir)
    expected = plain_loss(reference, groups)
    expected.backward()
    assert our_step(Policy(model), groups) == pytest.approx(expected.item(), abs=1e-5)
    assert_relative(take_gradients(model), take_gradients(reference), 1e-4)


def test_ten_steps_of_training_stay_together(tiny_model_dir: Path, groups: list[Group], tmp_path: Path) -> None:
    """Not one step only: the same optimizer on both sides goes the same way."""
    tuner, model = lora(tiny_model_dir)
    tuner.save(tmp_path, str(tiny_model_dir))
    reference = PeftModel.from_pretrained(plain_model(tiny_model_dir), tmp_path, is_trainable=True)
    theirs = [p for p in reference.parameters() if p.requires_grad]
    ours_optimizer = torch.optim.SGD(tuner.trainable().values(), lr=0.02)
    theirs_optimizer = torch.optim.SGD(theirs, lr=0.02)
    for i in range(10):
        rows = groups[i % 3 :: 2]
        expected = plain_loss(reference, rows)
        expected.backward()
        assert our_step(Policy(model), rows, 80) == pytest.approx(expected.item(), abs=1e-4)
        for optimizer in (ours_optimizer, theirs_optimizer):
            optimizer.step()
            optimizer.zero_grad()


def test_packed_is_unpacked(tiny_model_dir: Path, groups: list[Group]) -> None:
    """Hidden states and input gradients of each row, alone and in a pack, in both orders."""
    policy = Policy(load_model(tiny_model_dir))
    alone = [policy.hidden(collate([g])) for g in groups]
    for order in (range(len(groups)), reversed(range(len(groups)))):
        order = list(order)
        lengths = [groups[i].n_tokens for i in order]
        packed = policy.hidden(collate([groups[i] for i in order])).split(lengths)
        for i, rows in zip(order, packed, strict=True):
            torch.testing.assert_close(rows, alone[i], atol=1e-5, rtol=1e-5)


def test_one_row_of_a_pack_depends_on_no_other(tiny_model_dir: Path, groups: list[Group]) -> None:
    """The gradient of one row's hidden states with respect to every other row's embeddings is exactly zero."""
    model = load_model(tiny_model_dir)
    kept: list[Tensor] = []
    hook = model.get_input_embeddings().register_forward_hook(  # type: ignore[operator]
        lambda module, args, out: kept.append(out) or out.retain_grad()
    )
    batch = collate(groups[:3])
    a, b = batch.cu_seqlens[1], batch.cu_seqlens[2]
    Policy(model).hidden(batch)[a:b].square().sum().backward()
    hook.remove()
    grad = kept[0].grad[0]  # type: ignore[index]
    assert grad[a:b].abs().max() > 0
    assert not grad[:a].any() and not grad[b:].any()


@pytest.mark.parametrize("micro_batch_tokens", [1, 100, 200])
def test_any_cut_of_a_step_is_the_whole_step(
    tiny_model_dir: Path, groups: list[Group], micro_batch_tokens: int
) -> None:
    _, model = lora(tiny_model_dir)
    whole = our_step(Policy(model), groups)
    whole_grads = take_gradients(model)
    assert len(pack(groups, micro_batch_tokens)) > 1
    assert our_step(Policy(model), groups, micro_batch_tokens) == pytest.approx(whole, abs=1e-6)
    assert_relative(take_gradients(model), whole_grads, 1e-5)


def test_logprobs_are_those_of_the_full_logits(tiny_model_dir: Path, groups: list[Group]) -> None:
    rows = padded(groups)
    with torch.no_grad():
        logits = plain_model(tiny_model_dir)(rows["input_ids"], attention_mask=rows["attention_mask"]).logits
        want = logits[:, :-1].log_softmax(-1).gather(-1, rows["input_ids"][:, 1:, None])[..., 0]
        got = Policy(load_model(tiny_model_dir)).token_stats(collate(groups), {"logp"})["logp"]
    wanted = want[rows["labels"][:, 1:] != -100]
    torch.testing.assert_close(got[got != 0], wanted, atol=1e-5, rtol=1e-5)


def test_a_bfloat16_step_points_the_same_way(tiny_model_dir: Path, groups: list[Group]) -> None:
    """Half precision is judged by the direction of the whole gradient, not number by number."""
    tuner, model = lora(tiny_model_dir)
    exact = our_step(Policy(model), groups)
    want = torch.cat([g.flatten() for g in take_gradients(model).values()])
    half = LoRA(LoRA.Options())
    half_model = half.attach(load_model(tiny_model_dir, torch.bfloat16), 0)
    with torch.no_grad():
        for k, p in half.trainable().items():
            p.copy_(tuner.trainable()[k])
    policy, objective, batch = Policy(half_model, torch.bfloat16), SFT(SFT.Options()), collate(groups)
    loss = objective(policy, batch)["loss"].total / batch.weights_T.sum()
    loss.backward()
    got = torch.cat([g.flatten() for g in take_gradients(half_model).values()])
    assert loss.item() == pytest.approx(exact, rel=0.02)
    assert torch.cosine_similarity(got, want, dim=0) > 0.98


def test_merged_weights_in_a_job_that_continues(tiny_model_dir: Path, groups: list[Group], tmp_path: Path) -> None:
    """Full tuning from an adapter starts from base + adapter."""
    from tunewright.tuners.peft_adapter import merge_adapter

    tuner, model = lora(tiny_model_dir)
    tuner.save(tmp_path, str(tiny_model_dir))
    with torch.no_grad():
        want = Policy(model).hidden(collate(groups))
        got = Policy(merge_adapter(load_model(tiny_model_dir), tmp_path)).hidden(collate(groups))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.real_model
def test_the_real_model_step_is_that_of_transformers_and_peft(smollm2: Path, tmp_path: Path) -> None:
    check_lora_step(smollm2, rows_to_groups(smollm2, tiny.sft_rows(3)), tmp_path)


@pytest.mark.slow
@pytest.mark.real_model
def test_the_real_model_answers_and_splits_digits(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("in  2024") == ["in", "ĠĠ", "2", "0", "2", "4"]
    assert tokenizer.tokenize("<|im_end|>") == ["<|im_end|>"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )["input_ids"]
    model = load_model(smollm2)
    with torch.no_grad():
        for _ in range(8):
            batch = collate([Group((_example(prompt),))])
            prompt.append(int(head_of(model).logits(Policy(model).hidden(batch)[-1:]).argmax()))
    assert tokenizer.decode(prompt).endswith("The capital of France is Paris.<|im_end|>")


def _example(ids: list[int]) -> Any:
    from tunewright.core.example import Example

    return Example(tuple(ids), (0.0,) * len(ids))


def test_the_reference_is_not_ours(tiny_model_dir: Path, groups: list[Group]) -> None:
    """The reference must notice what we test for: contamination between rows changes its loss."""
    reference = plain_model(tiny_model_dir)
    joined = copy.deepcopy(padded(groups[:2]))
    ids = torch.cat([joined["input_ids"][i][joined["attention_mask"][i] > 0] for i in range(2)])[None]
    labels = torch.cat([joined["labels"][i][joined["attention_mask"][i] > 0] for i in range(2)])[None]
    with torch.no_grad():
        contaminated = reference(input_ids=ids, labels=labels).loss.item()
        clean = plain_loss(reference, groups[:2]).item()
    assert contaminated != pytest.approx(clean, abs=1e-3)
