"""A judge's preferences: which of two answers is better, asked twice with the places swapped; disagreement is a tie.

Judges favour a place (Zheng et al. 2023, arXiv 2306.05685, section 3.4): only a verdict that follows the answer to its
other place counts.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from tunewright.core.asking import Answer, Teacher, ask
from tunewright.data.asking import Asked, Call, in_turn

PRINCIPLES = "The better answer is more helpful, more correct and easier to understand, and does no harm."
QUESTION = """Two assistants answered the same conversation. Decide which answer is better by these principles:

{principles}

<conversation>
{conversation}
</conversation>

<answer 1>
{first}
</answer 1>

<answer 2>
{second}
</answer 2>

Which answer is better? Reply with 1 or 2 and nothing else."""

SAME_PLACE = {
    "1": "it chose whichever answer came first",
    "2": "it chose whichever answer came second",
}
UNCLEAR = "it named neither 1 nor 2, or both"


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, in no order that means anything."""

    prompt: list[Call]
    answers: tuple[str, str]


@dataclass
class Judged(Asked):
    """What became of the pairs. answered: those with a verdict; unusable: ties, by reason in `ties`. unequal answers
    only are asked about: `same` counts the others, and pairs with an empty answer."""

    same: int = 0
    ties: dict[str, int] = field(default_factory=dict)

    def count(self, answer: Answer) -> None:
        super().count(answer)
        if not answer.text:
            self.ties[answer.why] = self.ties.get(answer.why, 0) + 1


def judged_rows(
    pairs: Iterable[Pair],
    judge: Teacher,
    judged: Judged,
    principles: str,
    *,
    budget: int,
    concurrency: int,
    stop: Callable[[], bool],
) -> Iterator[Call]:
    """Preference rows in OpenAI's format, in order, without ties. principles: '' for the usual ones.

    budget, concurrency, stop and errors: as asking.in_turn has them; a pair takes two questions.
    """

    def one(pair: Pair, halt: threading.Event) -> Answer:
        return verdict(judge, pair, principles or PRINCIPLES, halt)

    asked = _unequal(pairs, judged)
    for pair, answer in in_turn(asked, one, judged, budget=budget, concurrency=concurrency, stop=stop):
        if answer.text:
            better, worse = pair.answers if answer.text == "1" else pair.answers[::-1]
            yield {
                "input": {"messages": pair.prompt},
                "preferred_output": [{"role": "assistant", "content": better}],
                "non_preferred_output": [{"role": "assistant", "content": worse}],
            }


def _unequal(pairs: Iterable[Pair], judged: Judged) -> Iterator[Pair]:
    for pair in pairs:
        first, second = (a.strip() for a in pair.answers)
        if first and second and first != second:
            yield pair
        else:
            judged.rows += 1
            judged.same += 1


def verdict(judge: Teacher, pair: Pair, principles: str, halt: threading.Event) -> Answer:
    """`1` or `2` for the pair's answers as they stand, '' for a tie. Raises EndpointDown, UserError."""
    first, second = pair.answers
    there = ask(judge, question(pair.prompt, first, second, principles), halt)
    choice = read_choice(there.text)
    if not choice:
        return Answer("", there.tokens, there.why or UNCLEAR, kept=there.kept)
    back = ask(judge, question(pair.prompt, second, first, principles), halt)
    other = read_choice(back.text)
    tokens, kept = there.tokens + back.tokens, there.kept and back.kept
    if not other:
        return Answer("", tokens, back.why or UNCLEAR, kept=kept)
    if other == choice:
        return Answer("", tokens, SAME_PLACE[choice], kept=kept)
    return Answer(choice, tokens, kept=kept)


def question(prompt: list[Call], first: str, second: str, principles: str) -> list[Call]:
    """The messages that a judge is sent."""
    said = "\n".join(f"{m['role']}: {m.get('content') or ''}" for m in prompt)
    text = QUESTION.format(principles=principles, conversation=said, first=first, second=second)
    return [{"role": "user", "content": text}]


def read_choice(text: str) -> str:
    """`1` or `2` if the judge named exactly one of them as a number of its own, else ''."""
    named = set(re.findall(r"(?<![\w.])[12](?![\w]|\.\d)", text))
    return named.pop() if len(named) == 1 else ""
