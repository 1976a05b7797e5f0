"""TRL's SFTTrainer on rows that are tokens already, with our loss mask. `trl_sft.py TASK.json`.

The task's options are SFTConfig's; what they leave open stays at TRL's default, except the learning rate, the schedule,
the batch size, the order of the rows and the length limit, which are the same for all rivals. Wrapping the collator
counts the tokens that really reach the model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from plain import adapters
from shared import Row, StepLog, Task, finish, read_rows, settle, token_hash
from trainer import Log, options
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


class Counted:
    """The trainer's collator, which also notes the tokens and the trained tokens of each batch."""

    def __init__(self, collate: Any, counts: list[tuple[int, int]]) -> None:
        self.collate = collate
        self.counts = counts

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        batch = self.collate(examples)
        mask = batch.get("attention_mask")
        tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
        self.counts.append((tokens, int((batch["labels"][:, 1:] != -100).sum())))
        return batch


def dataset(task: Task, rows: list[Row]) -> Dataset:
    """One epoch in our order, with labels of -100 where nothing is trained."""
    ordered = [rows[i] for i in task.order]
    labels = [[t if m else -100 for t, m in zip(r.ids, r.mask, strict=True)] for r in ordered]
    return Dataset.from_dict({"input_ids": [r.ids for r in ordered], "labels": labels})


def config(task: Task, kind: Any = SFTConfig) -> Any:
    """kind: the trainer's class of options."""
    return kind(**{"max_length": None, "bf16": task.dtype == "bfloat16", **options(task)})


def main() -> None:
    task = Task.load(sys.argv[1])
    settle(task)
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    rows = read_rows(task.data, tokenizer)
    torch.manual_seed(task.seed)
    log = Log(StepLog(task))
    trainer = SFTTrainer(
        model=task.model,
        args=config(task),
        train_dataset=dataset(task, rows),
        processing_class=tokenizer,
        peft_config=adapters(task) if task.tuner == "lora" else None,
        callbacks=[log],
    )
    trainer.data_collator = Counted(trainer.data_collator, log.counts)
    trainer.train()
    if task.save:
        trainer.save_model(str(Path(task.out) / "trained"))
    finish(task, token_hash=token_hash(rows))


if __name__ == "__main__":
    main()
