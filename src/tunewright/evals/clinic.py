"""The demo's evaluation: base, base with examples in its prompt and tuned model on held-out rows, and baselines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tunewright.data.demo import DEPARTMENTS, URGENCIES, ClinicRow
from tunewright.engine.client import EngineSession
from tunewright.evals.baselines import baseline_cards
from tunewright.evals.compare import Variant, replies
from tunewright.evals.task import JsonTask, Message, Scorecard, score_answers

TASK = JsonTask(
    instruction="You sort the messages that patients send to an online clinic.",
    labels={"department": DEPARTMENTS, "urgency": URGENCIES},
    texts=("reason",),
)
BASE, FEW_SHOT, TUNED = "base", "base + 3 examples", "tuned"
MAX_TOKENS = 64


def examples(train: Sequence[ClinicRow]) -> list[tuple[str, str]]:
    """(message, answer) of one row per urgency, each the first of a department not yet used."""
    chosen: list[ClinicRow] = []
    for urgency in URGENCIES:
        used = {row.department for row in chosen}
        chosen.append(next(r for r in train if r.urgency == urgency and r.department not in used))
    return [(row.message, row.answer) for row in chosen]


def prompts(system: str, train: Sequence[ClinicRow], heldout: Sequence[ClinicRow]) -> list[list[Message]]:
    """The chat messages that `system` gets for each held-out row; base and tuned get the patient's message alone."""
    if system == FEW_SHOT:
        shots = examples(train)
        return [TASK.few_shot(shots, row.message) for row in heldout]
    return [[{"role": "user", "content": row.message}] for row in heldout]


def ask(
    engine: EngineSession, chats: Sequence[list[Message]], base: str | None = None, artefact: Path | None = None
) -> Iterator[str]:
    """The greedy answers in order. Raises the first error the engine reports."""
    asked = Variant("", "", base, artefact)
    return (reply.text for reply in replies(engine, chats, asked, MAX_TOKENS))


def truths(rows: Sequence[ClinicRow]) -> dict[str, list[str]]:
    """Label field -> [N] labels."""
    return {field: [getattr(row, field) for row in rows] for field in TASK.labels}


def baselines(train: Sequence[ClinicRow], heldout: Sequence[ClinicRow]) -> list[Scorecard]:
    """The two systems without a language model, trained on the same rows."""
    texts, asked = [r.message for r in train], [r.message for r in heldout]
    return baseline_cards(texts, truths(train), asked, truths(heldout))


def score(system: str, answers: Sequence[str], heldout: Sequence[ClinicRow]) -> Scorecard:
    """The scorecard of a system's answers to the held-out rows."""
    return score_answers(TASK, system, answers, truths(heldout))
