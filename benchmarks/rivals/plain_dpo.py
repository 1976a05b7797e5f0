"""DPO in a plain loop: transformers + peft, padded batches, the adapter off for the reference.

`plain_dpo.py TASK.json`. Preferred and rejected answers are one batch, as in TRL; dtypes are those of plain.py.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from plain import load, padded
from shared import Row, StepLog, Task, batches, finish, read_pairs, settle, synchronize, token_hash
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
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=task.lr, weight_decay=0.0, fused=True)
    half = task.dtype == "bfloat16"
    log = StepLog(task)
    log.begin()
    for group in batches(task, pairs):
        rows: list[Row] = [chosen for chosen, _ in group] + [rejected for _, rejected in group]
        batch = padded(rows, device)
        with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
            with torch.no_grad(), model.disable_adapter():
                reference = logps(model, batch)
            chosen, rejected = logps(model, batch) - reference
        loss = -F.logsigmoid(BETA * (chosen - rejected)).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss, norm = float(loss.detach()), float(norm)
        synchronize()
        stop = log.end(sum(len(r.ids) for r in rows), sum(r.supervised for r in rows))
        log.add(len(log.times), loss=loss, grad_norm=norm)
        if stop:
            break
    finish(task, token_hash=token_hash([row for pair in pairs for row in pair]))


if __name__ == "__main__":
    main()
