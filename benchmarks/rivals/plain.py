"""The plain loop: transformers + peft as their documentation shows it, padded batches, AdamW. `plain.py TASK.json`.

The base is held in the task's dtype, the adapters in float32 (peft's default), products in the task's dtype by
autocast; full fine-tuning keeps float32 weights. No gradient checkpointing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from shared import Row, StepLog, Task, batches, finish, read_rows, settle, synchronize, token_hash
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(task: Task, device: torch.device) -> Any:
    """The model to train, with fresh adapters unless all of it is trained."""
    half = torch.bfloat16 if task.dtype == "bfloat16" and task.tuner != "full" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(task.model, dtype=half, attn_implementation="sdpa")
    model.config.use_cache = False
    if task.tuner != "full":
        torch.manual_seed(task.seed)
        model = get_peft_model(model, adapters(task))
    return model.to(device).train()


def adapters(task: Task) -> PeftConfig:
    """LoRA of the task's shape; another method of peft as the file in the folder `peft` of the options says."""
    if "peft" in task.options:
        return PeftConfig.from_pretrained(task.options["peft"])
    return LoraConfig(
        r=task.r, lora_alpha=task.alpha, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )


def padded(rows: list[Row], device: torch.device) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels [B, L], padded on the right."""
    longest = max(len(r.ids) for r in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n] = torch.tensor(row.ids)
        mask[i, :n] = 1
        labels[i, :n] = torch.where(torch.tensor(row.mask) > 0, ids[i, :n], -100)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def products(task: Task, device: torch.device) -> Any:
    return torch.autocast(device.type, torch.bfloat16) if task.dtype == "bfloat16" else nullcontext()


def train(
    task: Task, model: Any, items: list[Any], loss_of: Callable[[list[Any]], tuple[torch.Tensor, list[Row]]]
) -> None:
    """AdamW over the batches of `items`. loss_of(batch): its loss, and the rows that the model saw for it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=task.lr, weight_decay=0.0, fused=True)
    log = StepLog(task)
    log.begin()
    for group in batches(task, items):
        loss, rows = loss_of(group)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if hasattr(model, "base_model") and hasattr(model.base_model, "update_and_allocate"):  # AdaLoRA
            model.base_model.update_and_allocate(len(log.times) + 1)
        optimizer.zero_grad(set_to_none=True)
        loss, norm = float(loss.detach()), float(norm)
        synchronize()
        stop = log.end(sum(len(r.ids) for r in rows), sum(r.supervised for r in rows))
        log.add(len(log.times), loss=loss, grad_norm=norm)
        if stop:
            break


def main() -> None:
    task = Task.load(sys.argv[1])
    device = settle(task)
    rows = read_rows(task.data, AutoTokenizer.from_pretrained(task.model))
    model = load(task, device)

    def loss_of(group: list[Row]) -> tuple[torch.Tensor, list[Row]]:
        batch = padded(group, device)
        with products(task, device):
            return model(**batch).loss, group

    train(task, model, rows, loss_of)
    if task.save:
        model.save_pretrained(Path(task.out) / "trained")
    finish(task, token_hash=token_hash(rows))


if __name__ == "__main__":
    main()
