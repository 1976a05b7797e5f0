"""DPO in a plain loop: transformers + peft, padded batches, the adapter off for the reference.

`plain_dpo.py TASK.json`. Preferred and rejected answers are one batch, as in TRL; dtypes are those of plain.py.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from plain import load, padded, products, train
from shared import Row, Task, finish, read_pairs, settle, token_hash
from transformers import AutoTokenizer

BETA = 0.1


def logps(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[2, pairs] sums of the answers' log-probabilities, the preferred ones first."""
    labels = batch["labels"][:, 1:]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    each = torch.log_softmax(logits, -1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return (each * (labels != -100)).sum(-1).view(2, -1)


def main() -> None:
    task = Task.load(sys.argv[1])
    device = settle(task)
    pairs = read_pairs(task.data, AutoTokenizer.from_pretrained(task.model))
    model = load(task, device)

    def loss_of(group: list[tuple[Row, Row]]) -> tuple[torch.Tensor, list[Row]]:
        rows = [chosen for chosen, _ in group] + [rejected for _, rejected in group]
        batch = padded(rows, device)
        with products(task, device):
            with torch.no_grad(), model.disable_adapter():
                reference = logps(model, batch)
            chosen, rejected = logps(model, batch) - reference
        return -F.logsigmoid(BETA * (chosen - rejected)).mean(), rows

    train(task, model, pairs, loss_of)
    finish(task, token_hash=token_hash([row for pair in pairs for row in pair]))


if __name__ == "__main__":
    main()
