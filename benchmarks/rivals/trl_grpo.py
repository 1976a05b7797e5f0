"""TRL's GRPOTrainer on the same prompts, with the reward of our grader worked out here a second time.

`trl_grpo.py TASK.json`. A row has the messages of a prompt and the answer to compare with. A step has task.batch
prompts. The task's options are GRPOConfig's, as in trl_sft.py, and besides `given`: a file with the tokens of a step's
answers, in order, which then take the place of sampled ones.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from plain import adapters
from shared import Row, StepLog, Task, finish, settle, token_hash
from trainer import Log, options
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

GIVEN = "given"


def alike(text: str, reference: str) -> float:
    """2 LCS / (sum of both lengths), in characters; the longest common subsequence in the bits of one number (Allison
    and Dix 1986)."""
    places: dict[str, int] = {}
    for i, character in enumerate(text):
        places[character] = places.get(character, 0) | 1 << i
    row = 0
    for character in reference:
        either = row | places.get(character, 0)
        row = either & ((either - (row << 1 | 1)) ^ either)
    both = len(text) + len(reference)
    return 2 * row.bit_count() / both if both else 1.0


def grpo_config(task: Task) -> GRPOConfig:
    """A whole step is sampled at once, whatever it is cut into afterwards."""
    own = options(task)
    own.pop(GIVEN, None)
    answers = task.batch * own["num_generations"]
    fixed = {
        "per_device_train_batch_size": answers // own.get("gradient_accumulation_steps", 1),
        "shuffle_dataset": False,
        "bf16": task.dtype == "bfloat16",
    }
    return GRPOConfig(**{**own, **fixed})


def main() -> None:
    task = Task.load(sys.argv[1])
    settle(task)
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    rows = [json.loads(line) for line in Path(task.data).read_text(encoding="utf-8").splitlines()]
    asked = [row["messages"] for row in rows]
    torch.manual_seed(task.seed)
    log, answers = Log(StepLog(task)), list[tuple[int, float]]()

    def tokens(prompts: list[Any]) -> list[list[int]]:
        return tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)["input_ids"]

    ids = tokens(asked)
    lengths = [len(prompt) for prompt in ids]

    def rewards(
        completions: list[Any], completion_ids: list[list[int]], answer: list[str], n: list[int], **_: Any
    ) -> Any:
        """The rewards of a step's answers; also notes them, and counts the step's tokens."""
        found = [alike(said[0]["content"], wanted) for said, wanted in zip(completions, answer, strict=True)]
        made = [len(own) for own in completion_ids]
        answers.extend(zip(made, found, strict=True))
        log.counts.append((sum(n) + sum(made), sum(made)))
        return found

    def given(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        known = json.loads(Path(task.options[GIVEN]).read_text())
        return {"prompt_ids": tokens(prompts), "completion_ids": known, "logprobs": None}

    data = [{"prompt": asked[i], "answer": rows[i]["answer"], "n": lengths[i]} for i in task.order]
    trainer = GRPOTrainer(
        model=task.model,
        reward_funcs=rewards,
        args=grpo_config(task),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        peft_config=adapters(task),
        callbacks=[log],
        rollout_func=given if GIVEN in task.options else None,
    )
    trainer.train()
    finish(task, token_hash=token_hash([Row(prompt, []) for prompt in ids]), answers=answers)


if __name__ == "__main__":
    main()
