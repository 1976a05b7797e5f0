"""Scoring of JSON answers, the baselines and the verdict."""

from __future__ import annotations

import json

import jsonschema
import pytest

from tunewright.evals.baselines import majority_labels, tfidf_labels
from tunewright.evals.task import JsonTask, Scorecard, score_answers, score_labels
from tunewright.evals.verdict import judge

TASK = JsonTask("Sort the message.", {"team": ("red", "blue"), "speed": ("slow", "fast")}, ("reason",))
GOOD = {"team": "red", "speed": "slow", "reason": "because"}


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "no",
        "[]",
        "null",
        "{}",
        '"team"',
        json.dumps(GOOD) + " That's all.",
        "```json\n" + json.dumps(GOOD) + "\n```",
        json.dumps(GOOD)[:-1],
        json.dumps({**GOOD, "team": 3}),
        json.dumps({**GOOD, "reason": " "}),
        json.dumps({**GOOD, "more": "x"}),
        json.dumps({k: GOOD[k] for k in ("team", "speed")}),
        "[" * 100_000,
    ],
)
def test_what_is_not_a_valid_answer(answer: str) -> None:
    assert TASK.parse(answer) is None


@pytest.mark.parametrize("value", [GOOD, {**GOOD, "team": "green"}, dict(reversed(GOOD.items()))])
def test_valid_answers_whatever_order_and_label(value: dict[str, str]) -> None:
    assert TASK.parse("\n " + json.dumps(value) + " ") == value


def test_the_schema_accepts_answers_with_allowed_labels_only() -> None:
    validator = jsonschema.Draft202012Validator(TASK.schema())
    assert validator.is_valid(GOOD)
    assert not validator.is_valid({**GOOD, "team": "green"})
    assert not validator.is_valid({**GOOD, "more": ""})


def test_an_invalid_answer_is_wrong_everywhere_and_an_unknown_label_only_in_its_field() -> None:
    truths = {"team": ["red"] * 4, "speed": ["slow"] * 4}
    answers = [json.dumps(GOOD), "team red, slow", json.dumps({**GOOD, "team": "green"}), json.dumps(GOOD)]
    card = score_answers(TASK, "x", answers, truths)
    assert card.outcomes == {
        "valid_json": [True, False, True, True],
        "team": [True, False, False, True],
        "speed": [True, False, True, True],
    }
    valid = card.share("valid_json")
    assert valid is not None and valid.value == 0.75 and valid.low < 0.75 < valid.high


def test_labels_without_json_have_no_share_of_valid_json() -> None:
    card = score_labels("x", {"team": ["red", "blue"]}, {"team": ["red", "red"], "speed": ["slow", "slow"]})
    assert card.outcomes == {"team": [True, False]}
    assert card.share("valid_json") is None


def test_few_shot_prompt_is_schema_then_examples_then_the_message() -> None:
    messages = TASK.few_shot([("m1", "a1"), ("m2", "a2")], "now this")
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [m["content"] for m in messages[1:]] == ["m1", "a1", "m2", "a2", "now this"]
    assert json.dumps(TASK.schema()) in messages[0]["content"]


def test_baselines_learn_from_the_training_rows() -> None:
    assert majority_labels(["a", "b", "b"], 2) == ["b", "b"]
    texts = ["a red apple", "my red bike", "the blue sea", "such a blue day"]
    assert tfidf_labels(texts, ["r", "r", "b", "b"], ["something red", "nothing but blue"]) == ["r", "b"]


def card(name: str, right: int, n: int = 100) -> Scorecard:
    return Scorecard(name, {"team": [i < right for i in range(n)]})


def test_the_verdict_compares_with_the_best_rival() -> None:
    verdict = judge(card("tuned", 90), [card("weak", 10), card("strong", 50), Scorecard("other", {})], "team")
    assert (verdict.rival, verdict.word) == ("strong", "better")
    assert verdict.difference.value == pytest.approx(0.4)
    assert "+40 points" in str(verdict) and "strong" in str(verdict) and "p < 0.001" in str(verdict)
    assert judge(card("tuned", 50), [card("strong", 90)], "team").word == "worse"


def test_the_verdict_says_when_the_rows_do_not_decide() -> None:
    assert judge(card("tuned", 52), [card("rival", 50)], "team").word == "too close to call"
    assert judge(card("tuned", 50), [card("rival", 50)], "team").word == "too close to call"
    with pytest.raises(ValueError, match="nothing to compare"):
        judge(card("tuned", 50), [Scorecard("other", {})], "team")
