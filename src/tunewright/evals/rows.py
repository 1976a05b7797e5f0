"""Held-out rows of any chat file, and the task that their answers show: JSON objects with label fields, or labels.

What the demo's data set knows of itself is found here in the training answers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.core.conversation import Conversation
from tunewright.core.errors import DataError
from tunewright.data.validate import read_conversations
from tunewright.evals.task import JsonTask, Message, Scorecard, score_answers
from tunewright.metrics.accuracy import hits

ANSWER = "answer"
MAX_LABELS = 50
REPEATED = 2.0  # a field whose values occur at least so often on average is a label, else free text


@dataclass(frozen=True)
class Pair:
    """A row to be answered. chat: everything before the last answer. said: the last user message in it."""

    chat: list[Message]
    said: str
    answer: str


@dataclass(frozen=True)
class LabelTask:
    """The whole answer is one of a few labels; an answer is right if it is the label and nothing else."""

    instruction: str
    options: tuple[str, ...]

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        return {ANSWER: self.options}

    def truths(self, answers: Sequence[str]) -> dict[str, list[str]]:
        """Label field -> [N] labels."""
        return {ANSWER: [a.strip() for a in answers]}

    def score(self, name: str, answers: Sequence[str], right: Sequence[str]) -> Scorecard:
        truths = self.truths(right)
        return Scorecard(name, {ANSWER: hits([a.strip() for a in answers], truths[ANSWER])})

    def prompts(self) -> dict[str, dict[str, str]]:
        """Name -> options of the recipe `prompt`, for a model that was not tuned."""
        ask = f"Answer only with one of: {', '.join(self.options)}."
        return _around(self.instruction, ask)


@dataclass(frozen=True)
class ObjectTask:
    """The answer is a JSON object, as evals/task.py scores it."""

    task: JsonTask

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        return dict(self.task.labels)

    def truths(self, answers: Sequence[str]) -> dict[str, list[str]]:
        parsed = [self.task.parse(a) or {} for a in answers]
        return {field: [p.get(field, "") for p in parsed] for field in self.task.labels}

    def score(self, name: str, answers: Sequence[str], right: Sequence[str]) -> Scorecard:
        return score_answers(self.task, name, answers, self.truths(right))

    def prompts(self) -> dict[str, dict[str, str]]:
        ask = f"Answer only with a JSON object of this schema: {json.dumps(self.task.schema())}"
        return _around(self.task.instruction, ask)


Task = LabelTask | ObjectTask


def _around(instruction: str, ask: str) -> dict[str, dict[str, str]]:
    """The same request in three places: how much an untuned model depends on that is part of the answer."""
    return {
        "in the system message": {"system": f"{instruction} {ask}"},
        "before the message": {"template": f"{instruction} {ask}\n\n{{input}}"},
        "after the message": {"template": f"{{input}}\n\n{instruction} {ask}"},
    }


def read_pairs(path: Path) -> list[Pair]:
    """Every row of a chat file. Raises DataError."""
    return [_pair(row, path.name) for row in read_conversations(path)]


def _pair(row: Conversation, name: str) -> Pair:
    if row.shape == "labelled":
        text = "\n".join([row.text or "", *([row.text_pair] if row.text_pair else [])])
        return Pair([{"role": "user", "content": text}], text, row.label_text)
    turns = [{"role": m.role, "content": m.content or ""} for m in row.messages]
    said = [t["content"] for t in turns[:-1] if t["role"] == "user"]
    if row.shape != "chat" or not said or turns[-1]["role"] != "assistant":
        raise DataError(f"{name} line {row.source}: it needs a user message and the assistant's answer to it.")
    return Pair(turns[:-1], said[-1], turns[-1]["content"])


def find_task(answers: Sequence[str], instruction: str) -> Task:
    """The task of a training file's answers. Raises DataError if neither a JSON object nor a label shows in them."""
    objects = [_object(a) for a in answers]
    if objects and all(o is not None and o.keys() == (objects[0] or {}).keys() for o in objects):
        found = [o for o in objects if o is not None]
        kinds = {field: _labels([o[field] for o in found]) for field in found[0]}
        labels = {field: values for field, values in kinds.items() if values}
        if labels:
            texts = tuple(field for field, values in kinds.items() if not values)
            return ObjectTask(JsonTask(instruction, labels, texts))
    options = _labels([a.strip() for a in answers])
    if not options:
        raise DataError(
            "The training answers are neither JSON objects of one set of fields, with a field of few values, nor "
            f"labels of at most {MAX_LABELS} kinds; there is nothing to count as right or wrong."
        )
    return LabelTask(instruction, options)


def _object(answer: str) -> dict[str, str] | None:
    try:
        value: Any = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    good = isinstance(value, dict) and value and all(isinstance(v, str) for v in value.values())
    return value if good else None


def _labels(values: Sequence[str]) -> tuple[str, ...]:
    """The values in order, if they are few and repeat; else none."""
    counts = Counter(values)
    few = 2 <= len(counts) <= MAX_LABELS and len(values) >= REPEATED * len(counts)
    return tuple(sorted(counts)) if few else ()
