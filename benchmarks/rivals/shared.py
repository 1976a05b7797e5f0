"""What every rival's program shares: its task, the rows as tokens, the log of its steps.

Runs in the rival's own environment, so nothing of tunewright is imported: the tokens and the loss mask are worked out
here a second time, and the gates compare them with ours.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")


@dataclass(frozen=True)
class Task:
    """What one process has to do.

    model: a folder. data: prompt/completion rows. out: the folder for steps.jsonl and done.json.
    order: the rows' numbers as our first epoch takes them; the rivals' further epochs repeat it.
    steps: stop after so many; None: stop when `enough` says so. warm: steps before the measured window.
    seconds: length of the window; with min_steps steps in it, a quarter of that is enough.
    limit_s: a run of so many seconds from its first step ends too, whatever else it was to do.
    curve: whether every step's loss is wanted. save: whether the trained weights are written to out/trained.
    options: of this rival.
    """

    model: str
    data: str
    out: str
    order: list[int] = field(default_factory=list)
    tuner: str = "lora"
    r: int = 16
    alpha: int = 32
    batch: int = 8
    lr: float = 2e-4
    seed: int = 1
    epochs: int = 50
    dtype: str = "bfloat16"
    threads: int = 1
    steps: int | None = None
    warm: int = 1
    seconds: float = 120.0
    min_steps: int = 20
    limit_s: float | None = None
    curve: bool = False
    save: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def load(path: str) -> Task:
        return Task(**json.loads(Path(path).read_text()))


@dataclass(frozen=True)
class Row:
    """ids: [T] token ids. mask: [T] 1 where the token is trained."""

    ids: list[int]
    mask: list[int]

    @property
    def supervised(self) -> int:
        """Trained tokens; nothing predicts the first one."""
        return sum(self.mask[1:])


def enough(times: list[float], task: Task) -> bool:
    """Whether a run may stop. times: when each step so far ended."""
    if task.limit_s is not None and times and times[-1] - times[0] >= task.limit_s:
        return True
    if task.steps is not None:
        return len(times) >= task.steps
    if len(times) <= task.warm:
        return False
    elapsed, counted = times[-1] - times[task.warm - 1], len(times) - task.warm
    return elapsed >= task.seconds or (counted >= task.min_steps and elapsed >= task.seconds / 4)


def read_rows(path: str, tokenizer: Any) -> list[Row]:
    """The rows as tokens: what follows the generation prompt is trained, up to the end-of-turn token."""
    with open(path, encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    return [row_of(tokenizer, data["prompt"], data["completion"]) for data in found]


def read_pairs(path: str, tokenizer: Any) -> list[tuple[Row, Row]]:
    """The preferred and the rejected answer of each row as tokens, the prompt before each."""
    with open(path, encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    return [(row_of(tokenizer, d["prompt"], d["chosen"]), row_of(tokenizer, d["prompt"], d["rejected"])) for d in found]


def row_of(tokenizer: Any, prompt: list[dict[str, str]], completion: list[dict[str, str]]) -> Row:
    asked = _ids(tokenizer, prompt, add_generation_prompt=True)
    ids = _ids(tokenizer, prompt + completion)
    if ids[: len(asked)] != asked:
        raise SystemExit("the chat template writes a prompt differently when an answer follows")
    special = set(tokenizer.all_special_ids)
    end = max(i for i, token in enumerate(ids) if token in special) + 1
    return Row(ids, [0] * len(asked) + [1] * (end - len(asked)) + [0] * (len(ids) - end))


def _ids(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


def token_hash(rows: list[Row]) -> str:
    """12 hex digits over all token ids and masks, in the order of the file."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.ids, row.mask]).encode())
    return digest.hexdigest()[:12]


def batches(task: Task, rows: list[Any]) -> Iterator[list[Any]]:
    """The rows of each step, epoch after epoch."""
    for _ in range(task.epochs):
        for k in range(0, len(rows), task.batch):
            yield [rows[i] for i in task.order[k : k + task.batch]]


class StepLog:
    """One record a step in out/steps.jsonl; the first line says when step 1 began."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.times: list[float] = []
        self._file = open(Path(task.out) / "steps.jsonl", "w", encoding="utf-8")  # noqa: SIM115 open for the whole run

    def begin(self) -> None:
        self._write({"began": time.time()})

    def end(self, tokens: int, supervised: int) -> bool:
        """A step ended (the device must have finished it). Returns whether that was enough."""
        self.times.append(time.time())
        self._write({"step": len(self.times), "time": self.times[-1], "tokens": tokens, "supervised": supervised})
        return enough(self.times, self.task)

    def add(self, step: int, **values: float) -> None:
        """What became known of a step after its end: loss, grad_norm."""
        self._write({"step": step, **values})

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


def finish(task: Task, **facts: Any) -> None:
    """Write done.json: what the run has to say of itself."""
    facts = {"versions": versions(), "gpu_peak_bytes": gpu_peak(), **facts}
    temporary = Path(task.out) / "done.tmp"
    temporary.write_text(json.dumps(facts))
    temporary.rename(Path(task.out) / "done.json")


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # not every rival has every package
    return found


def gpu_peak() -> int:
    """Bytes that torch reserved on the GPU at its peak, 0 without one."""
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0


def settle(task: Task) -> Any:
    """Threads, seed and device of this process; returns the torch device."""
    import torch

    torch.set_num_threads(task.threads)
    torch.manual_seed(task.seed)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Wait for the GPU, so that a step's end is its end."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
