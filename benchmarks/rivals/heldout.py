"""The same judge for all: the mean loss of trained weights on held-out rows. `heldout.py TASK.json`.

options["trained"] is {name: folder}. Folders of LoRA adapters are put over the base, others are whole models. The loss
is that of transformers, per trained token, in float32 over products in the task's dtype.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from plain import padded
from shared import Row, Task, finish, read_rows, settle, token_hash
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def mean_loss(model: Any, rows: list[Row], task: Task, device: torch.device) -> float:
    """Summed over all trained tokens, then divided once."""
    total = 0.0
    for k in range(0, len(rows), task.batch):
        group = rows[k : k + task.batch]
        with torch.autocast(device.type, torch.bfloat16) if task.dtype == "bfloat16" else nullcontext():
            total += float(model(**padded(group, device)).loss) * sum(r.supervised for r in group)
    return total / sum(r.supervised for r in rows)


def open_trained(base: str, folder: Path) -> Any:
    if (folder / "adapter_config.json").exists():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(folder))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def main() -> None:
    task = Task.load(sys.argv[1])
    device = settle(task)
    rows = read_rows(task.data, AutoTokenizer.from_pretrained(task.model))
    losses = {}
    for name, folder in {"base": task.model, **task.options["trained"]}.items():
        model = open_trained(task.model, Path(folder)).to(device).eval()
        losses[name] = mean_loss(model, rows, task, device)
    finish(task, losses=losses, token_hash=token_hash(rows))


if __name__ == "__main__":
    main()
