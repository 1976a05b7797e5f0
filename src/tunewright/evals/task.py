"""A task whose answer is one JSON object with label fields: parsing, scoring row by row, a prompt for a base model.

Strict on purpose: a program would call json.loads on the answer, so text around the object makes it invalid.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tunewright.metrics.accuracy import hits, share
from tunewright.metrics.intervals import Interval

VALID = "valid_json"
Message = dict[str, str]


@dataclass(frozen=True)
class JsonTask:
    """What an answer must look like.

    instruction: one sentence for a model that was not tuned. labels: each label field with the values it may have.
    texts: the further fields, which must hold some text.
    """

    instruction: str
    labels: Mapping[str, tuple[str, ...]]
    texts: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        return (*self.labels, *self.texts)

    def parse(self, answer: str) -> dict[str, str] | None:
        """The answer's object, or None unless it is exactly one JSON object with exactly these fields, all texts.

        A label outside the allowed values is still valid JSON; it scores as wrong.
        """
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError):
            return None
        good = isinstance(value, dict) and set(value) == set(self.fields)
        return value if good and all(isinstance(v, str) and v.strip() for v in value.values()) else None

    def schema(self) -> dict[str, object]:
        """The JSON Schema of an answer."""
        labels = {name: {"type": "string", "enum": list(allowed)} for name, allowed in self.labels.items()}
        texts = {name: {"type": "string"} for name in self.texts}
        return {
            "type": "object",
            "properties": {**labels, **texts},
            "required": list(self.fields),
            "additionalProperties": False,
        }

    def few_shot(self, examples: Sequence[tuple[str, str]], message: str) -> list[Message]:
        """Chat messages for a model that was not tuned: instruction, schema, solved examples as turns, the message."""
        ask = f"{self.instruction} Answer only with a JSON object of this schema: {json.dumps(self.schema())}"
        shots = [
            turn
            for said, answer in examples
            for turn in ({"role": "user", "content": said}, {"role": "assistant", "content": answer})
        ]
        return [{"role": "system", "content": ask}, *shots, {"role": "user", "content": message}]


@dataclass(frozen=True)
class Scorecard:
    """How one system did. outcomes: measure -> [N] right or wrong, rows in the same order for every system."""

    name: str
    outcomes: dict[str, list[bool]] = field(default_factory=dict)

    def share(self, measure: str) -> Interval | None:
        """The share of right answers with its 95 % interval; None where the measure does not apply."""
        return share(self.outcomes[measure]) if measure in self.outcomes else None


def score_answers(task: JsonTask, name: str, answers: Sequence[str], truths: Mapping[str, Sequence[str]]) -> Scorecard:
    """Score texts: `valid_json`, and per label field whether it is right (an invalid answer is wrong everywhere).

    answers: [N] texts. truths: label field -> [N] labels.
    """
    parsed = [task.parse(answer) for answer in answers]
    labels = {name: hits([p[name] if p else None for p in parsed], truths[name]) for name in task.labels}
    return Scorecard(name, {VALID: [p is not None for p in parsed], **labels})


def score_labels(name: str, labels: Mapping[str, Sequence[str]], truths: Mapping[str, Sequence[str]]) -> Scorecard:
    """Score a system that predicts labels and writes no JSON. labels, truths: label field -> [N] labels."""
    return Scorecard(name, {field: hits(list(labels[field]), truths[field]) for field in labels})
