"""What a trained model is worth: loss of each held-out row, loss on text it was not tuned for, right answers."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import torch

from tunewright.core.example import Example, Group
from tunewright.core.home import Home
from tunewright.core.run import read_artefact
from tunewright.data.demo import HELDOUT, load
from tunewright.data.render import render_rows
from tunewright.data.tokenizer import Tokenizer
from tunewright.data.validate import read_conversations
from tunewright.engine.client import EngineSession
from tunewright.evals import clinic
from tunewright.models.loader import load_model, materialise
from tunewright.models.policy import Policy
from tunewright.ops.packing import collate
from tunewright.tuners import TUNERS
from tunewright.tuners.delta import merge_delta

UNRELATED, CHARACTERS = 32, 900
AT_ONCE = 8  # rows in a forward: packing does not change their numbers
Rows = Callable[[Tokenizer], list[Group]]


class Judge:
    """Losses with the plain modules, whatever a model was trained with. other: rows that it is not tuned for.

    half: products in bfloat16, where there are many models to judge; else all in float32.
    """

    def __init__(
        self, model: str, home: Home, held_out: Path, other: Rows | None = None, *, half: bool = False
    ) -> None:
        self._folder, self._half = materialise(model, home), half
        tokenizer = Tokenizer.load(self._folder, now=datetime.now())
        self._groups = {"held_out": read_rows(held_out, tokenizer), "unrelated": (other or unrelated)(tokenizer)}
        self.base = self._losses(Policy(load_model(self._folder)))

    def of(self, result: Path) -> dict[str, list[float]]:
        """{"held_out", "unrelated": [rows] nats a token} of a job's result."""
        return self._losses(open_result(self._folder, result))

    def _losses(self, policy: Policy) -> dict[str, list[float]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._half):
            return {name: row_losses(policy, groups) for name, groups in self._groups.items()}


def read_rows(path: Path, tokenizer: Tokenizer) -> list[Group]:
    """The rows of a file, whole."""
    return list(render_rows(read_conversations(path, "auto", path.name), tokenizer, max_length=1 << 20))


def manual() -> list[str]:
    """The pages of Python's own manual (in the standard library), the longest first."""
    return sorted(pydoc_data.topics.topics.values(), key=len, reverse=True)


def unrelated(tokenizer: Tokenizer) -> list[Group]:
    """The beginnings of the longest pages of the manual, as plain text."""
    ids = [tuple(tokenizer.encode(page[:CHARACTERS])[0]) for page in manual()[:UNRELATED]]
    return [Group((Example(row, (0.0, *(1.0 for _ in row[1:])), i + 1),)) for i, row in enumerate(ids)]


def open_result(base: Path, result: Path) -> Policy:
    """The trained model as training itself would continue it."""
    record = read_artefact(result)
    if record.kind == "weights":
        return Policy(load_model(result))
    model = load_model(base)
    if record.kind == "delta":
        return Policy(merge_delta(model, result))
    entry = TUNERS.load(record.tuner["name"])
    tuner = entry(entry.Options(**{k: v for k, v in record.tuner.items() if k != "name"}))
    model = tuner.attach(model, 0)
    tuner.load(result)
    return Policy(model.eval())


@torch.no_grad()
def row_losses(policy: Policy, groups: Sequence[Group]) -> list[float]:
    """Mean negative log-likelihood of each row's trained tokens."""
    found = []
    for i in range(0, len(groups), AT_ONCE):
        batch = collate(groups[i : i + AT_ONCE])
        told_T = -policy.token_stats(batch, want={"logp"})["logp"] * batch.weights_T
        rows = (slice(a, b) for a, b in pairwise(batch.cu_seqlens.tolist()))
        found += [float(told_T[row].sum() / batch.weights_T[row].sum()) for row in rows]
    return found


def answers_of(home: Home, result: Path) -> dict[str, list[bool]]:
    """{measure: [rows] right or wrong} of the served model's greedy answers to the demo's held-out messages."""
    rows = load(HELDOUT)
    with EngineSession(home) as engine:
        answers = list(clinic.ask(engine, clinic.prompts(clinic.TUNED, [], rows), artefact=result))
    return clinic.score(clinic.TUNED, answers, rows).outcomes
