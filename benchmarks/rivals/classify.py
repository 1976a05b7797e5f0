"""transformers' Trainer on a row classifier, as its documentation shows it. `classify.py TASK.json`.

Rows are {"text", "label"}; the model folder has its classification head already, so that all rivals start with the
same weights. The task's options are TrainingArguments'.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from shared import StepLog, Task, finish, settle
from trainer import Log, options
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)


def read(task: Task, tokenizer: Any, labels: dict[str, int]) -> list[dict[str, Any]]:
    """One epoch in our order, as tokens."""
    rows = [json.loads(line) for line in Path(task.data).read_text(encoding="utf-8").splitlines()]
    ordered = [rows[i] for i in task.order]
    return [{**tokenizer(r["text"], truncation=True), "labels": labels[r["label"]]} for r in ordered]


def main() -> None:
    task = Task.load(sys.argv[1])
    settle(task)
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    model = AutoModelForSequenceClassification.from_pretrained(task.model)
    log = Log(StepLog(task))
    collate = DataCollatorWithPadding(tokenizer)

    def counted(rows: list[dict[str, Any]]) -> Any:
        batch = collate(rows)
        log.counts.append((int(batch["attention_mask"].sum()), len(rows)))  # a row's label is its one trained thing
        return batch

    rows = read(task, tokenizer, model.config.label2id)
    args = TrainingArguments(**options(task))
    trainer = Trainer(model=model, args=args, train_dataset=rows, data_collator=counted, callbacks=[log])  # type: ignore[arg-type]
    trainer.train()
    finish(task, n_tokens=sum(len(r["input_ids"]) for r in rows))


if __name__ == "__main__":
    main()
