"""What the rivals share that are transformers' Trainer or made of it: the log of its steps, and its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from shared import StepLog, Task, synchronize
from transformers import TrainerCallback


class Log(TrainerCallback):
    """counts: (tokens, trained tokens) of each batch, which the collator notes."""

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


def options(task: Task) -> dict[str, Any]:
    """The same for all rivals, then the task's own."""
    return {
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
