"""What a trained model is worth: loss of each held-out row, loss on text it was not tuned for, right answers."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence
from datetime import datetime
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


class Judge:
    """Losses in float32 with the plain modules, whatever a model was trained with."""

    def __init__(self, model: str, home: Home, held_out: Path) -> None:
        self._folder = materialise(model, home)
        tokenizer = Tokenizer.load(self._folder, now=datetime.now())
        rows = read_conversations(held_out, "auto", held_out.name)
        self._groups = {
            "held_out": list(render_rows(rows, tokenizer, max_length=1 << 20)),
            "unrelated": unrelated(tokenizer),
        }
        self.base = self._losses(Policy(load_model(self._folder)))

    def of(self, result: Path) -> dict[str, list[float]]:
        """{"held_out", "unrelated": [rows] nats a token} of a job's result."""
        return self._losses(open_result(self._folder, result))

    def _losses(self, policy: Policy) -> dict[str, list[float]]:
        return {name: row_losses(policy, groups) for name, groups in self._groups.items()}


def unrelated(tokenizer: Tokenizer) -> list[Group]:
    """The beginnings of the longest pages of Python's own manual (in the standard library), as plain text."""
    pages = sorted(pydoc_data.topics.topics.values(), key=len, reverse=True)[:UNRELATED]
    ids = [tuple(tokenizer.encode(page[:CHARACTERS])[0]) for page in pages]
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
    for group in groups:
        batch = collate([group])
        logp_T = policy.token_stats(batch, want={"logp"})["logp"]
        found.append(float(-(logp_T * batch.weights_T).sum() / batch.weights_T.sum()))
    return found


def answers_of(home: Home, result: Path) -> dict[str, list[bool]]:
    """{measure: [rows] right or wrong} of the served model's greedy answers to the demo's held-out messages."""
    rows = load(HELDOUT)
    with EngineSession(home) as engine:
        answers = list(clinic.ask(engine, clinic.prompts(clinic.TUNED, [], rows), artefact=result))
    return clinic.score(clinic.TUNED, answers, rows).outcomes
