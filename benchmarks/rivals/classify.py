"""transformers' Trainer on a row classifier, as its documentation shows it. `classify.py TASK.json`.

Rows are {"text", "label"}; the model folder has its classification head already, so that all rivals start with the
same weights. The task's options are TrainingArguments'.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from shared import StepLog, Task, finish, settle, synchronize
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Log(TrainerCallback):
    """counts: tokens of each batch, noted by the collator; a row's label is its one trained thing."""

    def __init__(self, log: StepLog) -> None:
        self.log = log
        self.counts: list[tuple[int, int]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.log.times:
            self.log.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        synchronize()
        if self.log.end(*self.counts[len(self.log.times)]):
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.log.add(state.global_step, loss=float(logs["loss"]), grad_norm=float(logs["grad_norm"]))


def read(task: Task, tokenizer: Any, labels: dict[str, int]) -> list[dict[str, Any]]:
    """One epoch in our order, as tokens."""
    rows = [json.loads(line) for line in Path(task.data).read_text(encoding="utf-8").splitlines()]
    ordered = [rows[i] for i in task.order]
    return [{**tokenizer(r["text"], truncation=True), "labels": labels[r["label"]]} for r in ordered]


def arguments(task: Task) -> TrainingArguments:
    chosen: dict[str, Any] = {
        "output_dir": str(Path(task.out) / "trainer"),
        "per_device_train_batch_size": task.batch,
        "learning_rate": task.lr,
        "lr_scheduler_type": "constant",
        "num_train_epochs": task.epochs,
        "max_steps": task.steps or -1,
        "train_sampling_strategy": "sequential",
        "seed": task.seed,
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **({"logging_steps": 1} if task.curve else {}),
        **task.options,
    }
    return TrainingArguments(**chosen)


def main() -> None:
    task = Task.load(sys.argv[1])
    settle(task)
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    model = AutoModelForSequenceClassification.from_pretrained(task.model)
    log = Log(StepLog(task))
    collate = DataCollatorWithPadding(tokenizer)

    def counted(rows: list[dict[str, Any]]) -> Any:
        batch = collate(rows)
        log.counts.append((int(batch["attention_mask"].sum()), len(rows)))
        return batch

    rows = read(task, tokenizer, model.config.label2id)
    trainer = Trainer(model=model, args=arguments(task), train_dataset=rows, data_collator=counted, callbacks=[log])  # type: ignore[arg-type]
    trainer.train()
    finish(task, n_tokens=sum(len(r["input_ids"]) for r in rows))


if __name__ == "__main__":
    main()
