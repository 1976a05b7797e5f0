"""The objectives' trials without a model: which rows they have, what the judge says, when a verdict holds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from benchmarks import objectives_rows as rows_of
from benchmarks import objectives_verdict as verdict
from benchmarks.objectives_judge import choice

from tunewright.data.demo import DEPARTMENTS, HELDOUT, TRAIN, URGENCIES, load
from tunewright.data.judging import question


def run(before: list[float], after: list[float], **more: Any) -> dict[str, Any]:
    return {"before": before, "after": after, "more": more}


def test_a_demo_pair_differs_in_one_label() -> None:
    for part, rows in zip(("train", "held_out"), (load(TRAIN)[rows_of.START :], load(HELDOUT)), strict=True):
        pairs = getattr(rows_of.demo_pairs(), part)
        assert len(pairs) == len(rows)
        for row, pair in zip(rows, pairs, strict=True):
            right, wrong = (json.loads(pair[k][0]["content"]) for k in ("preferred_output", "non_preferred_output"))
            assert pair["input"]["messages"][0]["content"] == row.message
            assert right == {"department": row.department, "urgency": row.urgency}
            assert [right[k] == wrong[k] for k in right].count(False) == 1
            assert wrong["department"] in DEPARTMENTS and wrong["urgency"] in URGENCIES
    assert rows_of.demo_pairs() == rows_of.demo_pairs()
    for row in (prompts := rows_of.demo_prompts()).train + prompts.held_out:
        assert json.loads(row["messages"][-1]["content"])["department"] == row["department"]
    known = {row["messages"][0]["content"] for row in rows_of.demo_start()}
    learned = {row["messages"][0]["content"] for row in prompts.train}
    asked = {row["messages"][0]["content"] for row in prompts.held_out}
    assert len(known) == rows_of.START and not known & learned and not asked & (known | learned)


def test_marks_are_the_pairs_answers_in_turn() -> None:
    marks, pairs = rows_of.demo_marks(), rows_of.demo_pairs()
    assert marks.held_out == pairs.held_out
    assert [m["label"] for m in marks.train[:4]] == [True, False, True, False]
    for mark, pair in zip(marks.train, pairs.train, strict=True):
        said = pair["preferred_output" if mark["label"] else "non_preferred_output"][0]["content"]
        assert (mark["prompt"], mark["completion"]) == (pair["input"]["messages"], said)


def test_dialogues_that_are_no_pairs_are_left_out() -> None:
    def talk(*said: str) -> str:
        return "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}: {text}" for i, text in enumerate(said))

    good = {"chosen": talk("Hi", "Hello!", "How?", "So: one\n\ntwo"), "rejected": talk("Hi", "Hello!", "How?", "No")}
    others = [
        {"chosen": talk("Hi", "A"), "rejected": talk("Ho", "B")},
        {"chosen": talk("Hi", "A"), "rejected": talk("Hi", "A")},
        {"chosen": talk("Hi", " "), "rejected": talk("Hi", "B")},
        {"chosen": talk("Hi", "A", "B"), "rejected": talk("Hi", "A", "C")},
    ]
    (pair,) = rows_of.dialogue_pairs([good, *others])
    assert [m["role"] for m in pair["input"]["messages"]] == ["user", "assistant", "user"]
    assert pair["preferred_output"] == [{"role": "assistant", "content": "So: one\n\ntwo"}]
    assert pair["non_preferred_output"] == [{"role": "assistant", "content": "No"}]


def test_the_judge_names_the_only_answer_that_keeps_the_rule() -> None:
    def asked(first: str, second: str) -> str:
        messages = question([{"role": "user", "content": "Well?"}], first, second, "Be good.")
        return choice({"messages": messages}, lambda text: "?" in text)

    said = [asked("Why?\nSay", "No."), asked("No.", "Why?"), asked("A?", "B?"), asked("A", "B")]
    assert said == ["1", "2", "neither", "neither"]


def test_a_margin_must_rise_and_a_loss_fall_beyond_the_rows_spread() -> None:
    noisy = [run([0.0, 0.0, 0.0, 0.0] * 5, [1.0, -0.9, 1.0, -0.9] * 5)]
    assert not verdict.rises(noisy).met and not verdict.falls(noisy).met
    sure = [run([0.0, 1.0] * 10, [1.0, 1.5] * 10)]
    assert verdict.rises(sure).met and not verdict.falls(sure).met
    assert verdict.falls([run(sure[0]["after"], sure[0]["before"])]).met
    # over seeds: each row's mean
    assert verdict.rises([run([0.0] * 4, [3.0] * 4), run([0.0] * 4, [-1.0] * 4)]).change.startswith("+1.000")


def test_a_reward_must_rise_by_two_standard_errors() -> None:
    """[1, 0, 0, 0] * 4 more: mean 1/4, deviation sqrt(0.2), standard error 0.1118."""
    more = [1.0, 0.0, 0.0, 0.0] * 4
    found = verdict.pays([run([0.0] * 16, more)])
    assert found.met and found.change == "+0.250 (s.e. 0.112)"
    assert not verdict.pays([run([0.0] * 8, more[:8])]).met  # 0.25 and 0.164
    near = {"nats": 9.0, "tokens_before": 20.0, "tokens_after": 29.0}
    assert verdict.pays_nearby([run([0.0] * 16, more, **near)]).met
    for far in ({"nats": 10.5}, {"tokens_after": 31.0}, {"tokens_after": 9.0}):
        assert not verdict.pays_nearby([run([0.0] * 16, more, **{**near, **far})]).met


def test_a_rule_must_be_kept_thirty_points_more_often() -> None:
    def kept(n: int) -> list[float]:
        return [1.0] * n + [0.0] * (100 - n)

    assert verdict.satisfies([run(kept(20), kept(50))]).met
    assert not verdict.satisfies([run(kept(20), kept(49))]).met


@pytest.mark.parametrize(("right", "n", "met"), [(228, 400, True), (227, 400, False), (250, 399, False)])
def test_pairs_must_be_enough_and_surely_better_ordered_than_guessed(right: int, n: int, met: bool) -> None:
    """Wilson's lower bound of 228 / 400 is 0.5210, of 227 / 400 it is 0.5185."""
    hits = [1.0] * right + [0.0] * (n - right)
    assert verdict.orders([run([0.5] * n, hits)]).met is met


def test_a_classifier_must_beat_both_in_every_seed() -> None:
    """6 rows to 0: p = 2 / 2^6 = 0.031; 5 to 0: 0.0625."""
    counted, best, nearly = [0.0] * 6 + [1.0] * 4, [1.0] * 10, [1.0] * 5 + [0.0] + [1.0] * 4
    assert verdict.classifies([run(counted, best, majority=counted)]).met
    assert not verdict.classifies([run(counted, best, majority=nearly)]).met
    assert not verdict.classifies([run(counted, s, majority=counted) for s in (best, nearly)]).met
    assert not verdict.classifies([run(best, counted, majority=counted)]).met
