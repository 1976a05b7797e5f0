"""A judge's preferences: both orders are asked, a place is no reason, garbage is a tie, nothing is asked twice."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teacher_kit import completion
from tunewright.core.asking import Teacher
from tunewright.core.errors import EndpointDown
from tunewright.core.outbound import Endpoint, Reply
from tunewright.data.judging import PRINCIPLES, SAME_PLACE, UNCLEAR, Judged, Pair, judged_rows, read_choice

ENDPOINT = Endpoint("https", "judge.example", 443, "/v1")
PROMPT = [{"role": "user", "content": "Which colour?"}]


def answers_in(body: Any) -> list[str]:
    """The two answers that the judge was shown, in their places."""
    return re.findall(r"<answer \d>\n(.*?)\n</answer \d>", body["messages"][-1]["content"], re.DOTALL)


def shorter(body: Any) -> str:
    first, second = answers_in(body)
    return "1" if len(first) < len(second) else "2"


class Judge:
    """post() of a judge; say: what it says to a request."""

    def __init__(self, say: Callable[[Any], str | None]) -> None:
        self.say = say
        self.bodies: list[Any] = []
        self.lock = threading.Lock()

    def __call__(self, endpoint: Endpoint, path: str, body: Any, timeout: float) -> Reply:
        with self.lock:
            self.bodies.append(body)
        said = self.say(body)
        return Reply(503, None) if said is None else Reply(200, completion(said))


PAIRS = [
    Pair(PROMPT, ("red " * (i + 2), "blue")) if i % 2 else Pair(PROMPT, ("blue", "red " * (i + 2))) for i in range(6)
]


def run(
    judge: Judge, cache: Path, pairs: list[Pair] = PAIRS, principles: str = "", **limits: Any
) -> tuple[Any, Judged]:
    asked, judged = Teacher(ENDPOINT, "m", cache, back_off=(), post=judge), Judged()
    how = {"budget": 10**6, "concurrency": 3, "stop": lambda: False, **limits}
    return list(judged_rows(pairs, asked, judged, principles, **how)), judged


def test_the_better_answer_is_preferred_wherever_it_stands(tmp_path: Path) -> None:
    judge = Judge(shorter)
    rows, judged = run(judge, tmp_path)
    assert [r["preferred_output"] for r in rows] == [[{"role": "assistant", "content": "blue"}]] * 6
    worse = [a for p in PAIRS for a in p.answers if a != "blue"]
    assert [r["non_preferred_output"][0]["content"] for r in rows] == worse
    assert all(r["input"] == {"messages": PROMPT} for r in rows)
    assert (judged.rows, judged.answered, judged.unusable, judged.kept, judged.tokens) == (6, 6, 0, 0, 120)
    shown = [tuple(answers_in(b)) for b in judge.bodies]
    assert sorted(shown) == sorted(a for p in PAIRS for a in (p.answers, p.answers[::-1]))
    text = judge.bodies[0]["messages"][0]["content"]
    assert PRINCIPLES in text and "<conversation>\nuser: Which colour?\n</conversation>" in text

    away = Judge(lambda body: None)
    again, judged = run(away, tmp_path)
    assert again == rows and not away.bodies and (judged.kept, judged.tokens) == (6, 120)
    with pytest.raises(EndpointDown, match="resume the job later"):  # other principles are another question
        run(away, tmp_path, principles="Be brief.")


@pytest.mark.parametrize(
    ("say", "why"),
    [
        (lambda body: "1", SAME_PLACE["1"]),
        (lambda body: "Answer 2.", SAME_PLACE["2"]),
        (lambda body: "Both are fine.", UNCLEAR),
        (lambda body: "1 or 2", UNCLEAR),
        (lambda body: "  ", "the server's answer holds no text"),
    ],
)
def test_a_judge_that_goes_by_the_place_or_talks_nonsense_gives_ties_only(
    tmp_path: Path, say: Callable[[Any], str], why: str
) -> None:
    rows, judged = run(Judge(say), tmp_path)
    assert rows == [] and (judged.answered, judged.unusable) == (0, 6)
    assert judged.ties == {why: 6} and judged.reason == why


def test_pairs_that_cannot_differ_are_not_asked_about(tmp_path: Path) -> None:
    judge = Judge(shorter)
    pairs = [Pair(PROMPT, ("a", "a ")), Pair(PROMPT, ("", "b")), Pair(PROMPT, ("a", "long"))]
    rows, judged = run(judge, tmp_path, pairs)
    assert len(rows) == 1 and len(judge.bodies) == 2
    assert (judged.rows, judged.same, judged.answered) == (3, 2, 1)


def test_after_the_budget_no_more_is_asked(tmp_path: Path) -> None:
    judge = Judge(shorter)
    rows, judged = run(judge, tmp_path, budget=50, concurrency=1)
    assert len(rows) == 3 and len(judge.bodies) == 6 and judged.left_out == 3


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("1", "1"), ("2.", "2"), ("**Answer 2**", "2"), ("[[1]]", "1"), ("Answer 1 is better: it is short.", "1"),
        ("", ""), ("neither", ""), ("1 or 2", ""), ("12", ""), ("1.5", ""), ("2.1", ""), ("v2", ""), ("3", ""),
    ],
)  # fmt: skip
def test_a_choice_is_one_number(text: str, choice: str) -> None:
    assert read_choice(text) == choice
