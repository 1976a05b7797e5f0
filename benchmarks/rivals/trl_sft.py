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
from peft import LoraConfig
from shared import Row, StepLog, Task, finish, read_rows, settle, synchronize, token_hash
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Counted:
    """The trainer's collator, which also notes the tokens and the trained tokens of each batch."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate
        self.counts: list[tuple[int, int]] = []

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        batch = self.collate(examples)
        mask = batch.get("attention_mask")
        tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
        self.counts.append((tokens, int((batch["labels"][:, 1:] != -100).sum())))
        return batch


class Log(TrainerCallback):
    def __init__(self, log: StepLog) -> None:
        self.log = log
        self.counted: Counted | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.log.times:
            self.log.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        synchronize()
        assert self.counted is not None
        if self.log.end(*self.counted.counts[len(self.log.times)]):
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.log.add(state.global_step, loss=float(logs["loss"]), grad_norm=float(logs["grad_norm"]))


def dataset(task: Task, rows: list[Row]) -> Dataset:
    """One epoch in our order, with labels of -100 where nothing is trained."""
    ordered = [rows[i] for i in task.order]
    labels = [[t if m else -100 for t, m in zip(r.ids, r.mask, strict=True)] for r in ordered]
    return Dataset.from_dict({"input_ids": [r.ids for r in ordered], "labels": labels})


def config(task: Task, kind: Any = SFTConfig) -> Any:
    """kind: the trainer's class of options."""
    chosen: dict[str, Any] = {
        "output_dir": str(Path(task.out) / "trl"),
        "per_device_train_batch_size": task.batch,
        "learning_rate": task.lr,
        "lr_scheduler_type": "constant",
        "num_train_epochs": task.epochs,
        "max_steps": task.steps or -1,
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "seed": task.seed,
        "bf16": task.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **({"logging_steps": 1} if task.curve else {}),
        **task.options,
    }
    return kind(**chosen)


def main() -> None:
    task = Task.load(sys.argv[1])
    settle(task)
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    rows = read_rows(task.data, tokenizer)
    lora = LoraConfig(
        r=task.r, lora_alpha=task.alpha, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    torch.manual_seed(task.seed)
    callback = Log(StepLog(task))
    trainer = SFTTrainer(
        model=task.model,
        args=config(task),
        train_dataset=dataset(task, rows),
        processing_class=tokenizer,
        peft_config=lora if task.tuner == "lora" else None,
        callbacks=[callback],
    )
    callback.counted = trainer.data_collator = Counted(trainer.data_collator)
    trainer.train()
    if task.save:
        trainer.save_model(str(Path(task.out) / "trained"))
    finish(task, token_hash=token_hash(rows))


if __name__ == "__main__":
    main()
