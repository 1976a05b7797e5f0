"""Do I need to tune at all? Base, prompt, few-shot, retrieval and tuned model answer the same held-out rows.

A system may have several variants (prompts, seeds): their spread is part of the answer. The cost of an answer is told
beside its worth.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunewright.core.errors import TunewrightError
from tunewright.engine.client import EngineSession, Reply, payload
from tunewright.evals.rows import Pair, Task
from tunewright.evals.task import Message, Scorecard
from tunewright.evals.verdict import Verdict, judge
from tunewright.metrics.intervals import Interval, wilson

TOGETHER = 16


@dataclass(frozen=True)
class Variant:
    """What is asked: a base model by name, or the folder of a tuned model or recipe."""

    system: str
    name: str
    base: str | None = None
    artefact: Path | None = None


@dataclass(frozen=True)
class Measured:
    """A variant's answers and their cost: tokens and seconds are means of an answer (TOGETHER computed at once)."""

    variant: Variant
    card: Scorecard
    answers: list[str]
    prompt_tokens: float
    completion_tokens: float
    seconds: float


@dataclass(frozen=True)
class Line:
    """One system. shares: measure -> mean over its variants, with the 95 % interval over rows.

    spread: measure -> (worst, best) variant.
    """

    system: str
    n_variants: int
    shares: dict[str, Interval]
    spread: dict[str, tuple[float, float]]
    prompt_tokens: float
    completion_tokens: float
    seconds: float


def replies(
    engine: EngineSession, chats: Sequence[list[Message]], variant: Variant, max_tokens: int
) -> Iterator[Reply]:
    """The greedy answers in order. Raises the first error the engine reports."""
    requests = [payload(c, variant.base, variant.artefact, temperature=0.0, max_tokens=max_tokens) for c in chats]
    for reply in engine.chat_many(requests, concurrency=TOGETHER):
        if isinstance(reply, TunewrightError):
            raise reply
        yield reply


def measure(
    engine: EngineSession, task: Task, variant: Variant, rows: Sequence[Pair], max_tokens: int
) -> Iterator[Reply | Measured]:
    """Every reply as it comes, and at the end what they are worth. The first answer loads the model, off the clock."""
    chats = [row.chat for row in rows]
    engine.reply(payload(chats[0], variant.base, variant.artefact, temperature=0.0, max_tokens=1))
    found, begun = [], time.perf_counter()
    for reply in replies(engine, chats, variant, max_tokens):
        found.append(reply)
        yield reply
    seconds, answers = time.perf_counter() - begun, [r.text for r in found]
    tokens = {k: sum(r.usage[k] for r in found) / len(found) for k in ("prompt_tokens", "completion_tokens")}
    name = f"{variant.system}, {variant.name}" if variant.name else variant.system
    card = task.score(name, answers, [row.answer for row in rows])
    yield Measured(variant, card, answers, seconds=seconds / len(found), **tokens)


def lines(measured: Sequence[Measured]) -> list[Line]:
    """One line a system, in the order in which they came."""
    names = dict.fromkeys(m.variant.system for m in measured)
    return [_line(name, [m for m in measured if m.variant.system == name]) for name in names]


def _line(system: str, variants: Sequence[Measured]) -> Line:
    cards = [m.card for m in variants]
    shares, spread = {}, {}
    for name in cards[0].outcomes:
        each = [sum(c.outcomes[name]) / len(c.outcomes[name]) for c in cards]
        spread[name] = (min(each), max(each))
        shares[name] = mean_share(cards, name)
    n = len(variants)
    return Line(
        system,
        n,
        shares,
        spread,
        sum(m.prompt_tokens for m in variants) / n,
        sum(m.completion_tokens for m in variants) / n,
        sum(m.seconds for m in variants) / n,
    )


def mean_share(cards: Sequence[Scorecard], name: str) -> Interval:
    """The share of right answers, a mean over the cards (variants on the same rows), with its 95 % interval over rows.

    Wilson's with one trial a row, however many variants answered it: their answers are not independent.
    """
    n = len(cards[0].outcomes[name])
    return wilson(sum(sum(c.outcomes[name]) for c in cards) / len(cards), n)


def verdicts(tuned: Scorecard, others: Sequence[Scorecard], fields: Mapping[str, object]) -> list[Verdict]:
    """The tuned model against the best of all others, each variant by itself, for every label field."""
    return [judge(tuned, others, field) for field in fields]


def conclusion(found: Sequence[Verdict]) -> str:
    """The table's question answered in a sentence or two."""
    told = []
    by_word = {word: [v for v in found if v.word == word] for word in ("better", "worse")}
    if by_word["better"]:
        fields = ", ".join(v.measure for v in by_word["better"])
        told.append(f"Tuning pays here: on {fields} it is surely better than anything without tuning.")
    if by_word["worse"]:
        told.append(f"On {_rivals(by_word['worse'])} did surely better than the tuned model.")
    if not told:
        told.append(f"Tuning is not shown to pay here; as far as these rows tell, as good: on {_rivals(found)}.")
    return " ".join(told)


def _rivals(found: Sequence[Verdict]) -> str:
    """`department prompt, urgency TF-IDF`."""
    return ", on ".join(f"{v.measure} {v.rival}" for v in found)
