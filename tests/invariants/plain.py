"""The independent reference: transformers and peft used plainly, with padding, attention masks and labels of -100; and
our side of the comparison: models to compare, a step of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tunewright.core.example import Example, Group
from tunewright.models.fast_llama import FastLlama
from tunewright.models.fast_serves import why_not
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy
from tunewright.objectives.sft import SFT
from tunewright.ops.kernels import Kernels
from tunewright.ops.packing import pack
from tunewright.tuners.base import Tuner
from tunewright.tuners.lora import LoRA


def rows_to_groups(folder: Path, rows: list[dict[str, Any]]) -> list[Group]:
    """Chat rows as groups: the last turn is supervised, with weight 1."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    groups = []
    for i, row in enumerate(rows):
        full = tokenizer.apply_chat_template(row["messages"])["input_ids"]
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True)["input_ids"]
        weights = [0.0] * len(prompt) + [1.0] * (len(full) - len(prompt))
        groups.append(Group((Example(tuple(full), tuple(weights), source=i + 1),)))
    return groups


def plain_model(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def padded(groups: list[Group]) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels [B, L], padded on the right; labels are -100 where nothing is trained."""
    examples = [e for g in groups for e in g.examples]
    longest = max(len(e.ids) for e in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for i, e in enumerate(examples):
        n = len(e.ids)
        ids[i, :n] = torch.tensor(e.ids)
        mask[i, :n] = 1
        labels[i, :n] = torch.where(torch.tensor(e.weights) > 0, torch.tensor(e.ids), torch.tensor(-100))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain_loss(model: nn.Module, groups: list[Group]) -> Tensor:
    """The loss that transformers computes itself: the mean over all trained tokens."""
    return model(**padded(groups)).loss


def lora(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Tuner, nn.Module]:
    """A LoRA whose B is not zero, so that A has a gradient too."""
    tuner = LoRA(LoRA.Options(**options))
    model = tuner.attach(load_model(folder, dtype), 0)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for k, p in tuner.trainable().items():
            if "lora_B" in k:
                p.add_(0.02 * torch.randn(p.shape, generator=g))
    return tuner, model


def shake(tuner: Tuner, folder: Path, size: float) -> nn.Module:
    """The model with the tuner attached, and all that is trained away from where it started."""
    model = tuner.attach(load_model(folder), 0)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in tuner.trainable().values():
            p.add_(size * torch.randn(p.shape, generator=g))
    return model


def give_biases(model: nn.Module) -> None:
    """transformers starts biases at zero, where leaving them out would not be seen."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.add_(torch.randn(p.shape, generator=g))


def fast(model: nn.Module, kernels: Kernels, dtype: torch.dtype = torch.float32) -> Policy:
    assert why_not(model, dtype) is None
    return Policy(model, None if dtype == torch.float32 else dtype, fast=FastLlama(model, dtype, kernels))


def assert_relative(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert set(got) == set(want) != set()
    for k in want:
        assert (got[k] - want[k]).norm() <= tolerance * want[k].norm(), k
        assert want[k].norm() > 0, k


def our_step(policy: Policy, groups: list[Group], budget: int = 10**6) -> float:
    """Loss of an optimizer step in micro-batches of `budget` tokens, its gradients left on the parameters."""
    objective = SFT(SFT.Options())
    batches = pack(groups, budget)
    weight = sum(objective.weights(b)["loss"] for b in batches)
    loss = 0.0
    for batch in batches:
        part = objective(policy, batch)["loss"].total / weight
        part.backward()
        loss += part.item()
    return loss


def take_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name; the model has none afterwards."""
    found = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def step(policy: Policy, groups: list[Group], budget: int = 10**6) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients by parameter name) of one optimizer step."""
    return our_step(policy, groups, budget), take_gradients(policy.model)
