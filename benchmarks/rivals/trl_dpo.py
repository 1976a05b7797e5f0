"""TRL's DPOTrainer on pairs that are tokens already, with our loss mask. `trl_dpo.py TASK.json`.

The task's options are DPOConfig's, as in trl_sft.py. The trainer tokenises its data set when it is made and cannot be
told not to, so it is made with a few rows and then given the tokens.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from datasets import Dataset
from plain import adapters
from shared import Row, StepLog, Task, finish, read_pairs, settle, token_hash
from trainer import Log
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl_sft import config

SAMPLE = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]


class Counted:
    """The trainer's collator, with answers that end at the end-of-turn token; it notes each batch's tokens."""

    def __init__(self, collate: Any, counts: list[tuple[int, int]], special: set[int]) -> None:
        self.collate = collate
        self.counts = counts
        self.special = special

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        batch = self.collate(examples)
        for ids, mask, real in zip(
            *(batch[k] for k in ("input_ids", "completion_mask", "attention_mask")), strict=True
        ):
            n = int(real.sum())
            end = max(i for i in range(n) if int(ids[i]) in self.special) + 1
            mask[end:] = 0
        self.counts.append((int(batch["attention_mask"].sum()), int(batch["completion_mask"][:, 1:].sum())))
        return batch


def tokens(pair: tuple[Row, Row]) -> dict[str, list[int]]:
    prompt = pair[0].mask.index(1)
    return {
        "prompt_ids": pair[0].ids[:prompt],
        "chosen_ids": pair[0].ids[prompt:],
        "rejected_ids": pair[1].ids[prompt:],
    }


def main() -> None:
    task = Task.load(sys.argv[1])
    settle(task)
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    pairs = read_pairs(task.data, tokenizer)
    torch.manual_seed(task.seed)
    log = Log(StepLog(task))
    trainer = DPOTrainer(
        model=task.model,
        args=config(task, DPOConfig),
        train_dataset=Dataset.from_list([{"prompt": SAMPLE[0], "chosen": SAMPLE[1], "rejected": SAMPLE[1]}] * 2),
        processing_class=tokenizer,
        peft_config=adapters(task) if task.tuner == "lora" else None,
        callbacks=[log],
    )
    trainer.train_dataset = Dataset.from_list([tokens(pairs[i]) for i in task.order])
    trainer.data_collator = Counted(trainer.data_collator, log.counts, set(tokenizer.all_special_ids))
    trainer.train()
    finish(task, token_hash=token_hash([row for pair in pairs for row in pair]))


if __name__ == "__main__":
    main()
