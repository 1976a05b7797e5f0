"""Rows of preferences: what they may look like, what makes them useless, and what they become as tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from tunewright.core.conversation import Conversation, Message
from tunewright.core.errors import DataError, Problem
from tunewright.data.answers import unusable_answers
from tunewright.data.formats import FORMATS
from tunewright.data.formats.detect import decide
from tunewright.data.render import RenderReport, render_rows
from tunewright.data.tokenizer import Tokenizer
from tunewright.data.validate import check_file

USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Hello!"), ("assistant", "No")))


def convert(name: str, row: dict[str, Any]) -> Conversation:
    return FORMATS.load(name).convert(row, 3)


def problems(name: str, row: dict[str, Any]) -> list[Problem]:
    with pytest.raises(DataError) as e:
        convert(name, row)
    return e.value.problems


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "completion": "Hello!", "label": True},
        {"prompt": [USER], "completion": [GOOD], "label": "TRUE "},
        {"messages": [USER, GOOD], "label": 1},
    ],
)
def test_a_marked_answer_in_each_spelling(row: dict[str, Any]) -> None:
    found = convert("unpaired", row)
    assert decide([row]).format is FORMATS.load("unpaired")
    assert found.shape == "unpaired" and found.label is True
    assert [(m.role, m.content) for m in found.messages] == [("user", "Hi"), ("assistant", "Hello!")]
    assert convert("unpaired", {**row, "label": 0}).label is False


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"label": "good"}, "neither true nor false"),
        ({"label": 2}, "neither true nor false"),
        ({"label": None}, 'missing key "label"'),
        ({"completion": [GOOD, GOOD]}, "2 messages"),
        ({"completion": [USER]}, "must end with an assistant message"),
        ({"completion": ""}, "empty completion"),
        ({"prompt": 3}, "prompt of type number"),
    ],
)
def test_a_marked_answer_that_is_none(changes: dict[str, Any], text: str) -> None:
    row = {"prompt": "Hi", "completion": "Hello!", "label": True}
    assert text in problems("unpaired", {**row, **changes})[0].message
    assert "prompt" in problems("unpaired", {"messages": [GOOD], "label": True})[0].message


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "No"},
        {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_pairs_as_public_sets_have_them(row: dict[str, Any]) -> None:
    found = convert("chosen_rejected", row)
    assert decide([row]).format is FORMATS.load("chosen_rejected")
    assert found.shape == "preference"
    assert [m.content for m in found.messages] == ["Hi"]
    assert [m.content for m in found.preferred or []] == ["Hello!"]
    assert [m.content for m in found.rejected or []] == ["No"]


@pytest.mark.parametrize(
    "row, text",
    [
        ({"chosen": "Hello!", "rejected": "No"}, "has no prompt"),
        ({"prompt": "Hi", "chosen": "a"}, 'missing key "rejected"'),
        ({"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD, USER]}, "rejected with assistant, user after the prompt"),
        ({"prompt": "Hi", "chosen": 1, "rejected": "a"}, "chosen of type number"),
    ],
)
def test_pairs_that_are_none(row: dict[str, Any], text: str) -> None:
    assert text in problems("chosen_rejected", row)[0].message


def test_sharegpt_and_openai_pairs_are_still_themselves() -> None:
    sharegpt = {"conversations": [{"from": "human", "value": "Hi"}], "chosen": "a", "rejected": "b"}
    assert decide([sharegpt]).format is FORMATS.load("sharegpt")
    for row, name in ((tiny.pair_rows(1)[0], "openai_dpo"), ({"prompt": "a", "completion": "b"}, "prompt_completion")):
        assert decide([row]).format is FORMATS.load(name)


def test_answers_of_which_nothing_can_be_learned() -> None:
    def pair(good: str | None, bad: str | None) -> Conversation:
        answers = [[Message(role="assistant", content=text)] for text in (good, bad)]
        return Conversation(messages=[Message(role="user", content="q")], preferred=answers[0], rejected=answers[1])

    assert not list(unusable_answers(pair("a", "b")))
    assert [p.field for p in unusable_answers(pair(" \n", "b"))] == ["preferred"]
    assert [p.field for p in unusable_answers(pair("a", None))] == ["rejected"]
    assert "prefers nothing" in next(iter(unusable_answers(pair("a", "a")))).message
    chat = Conversation(messages=[Message(role="user", content="q"), Message(role="assistant", content="")])
    assert not list(unusable_answers(chat))
    assert [p.field for p in unusable_answers(chat.model_copy(update={"label": True}))] == ["marked"]


def test_a_file_tells_all_of_its_useless_pairs(tmp_path: Path) -> None:
    rows = tiny.pair_rows(12)
    for i in (3, 7):
        rows[i]["non_preferred_output"] = rows[i]["preferred_output"]
    report = check_file(tiny.write_rows(tmp_path / "a.jsonl", rows))
    assert [p.line for p in report.problems] == [4, 8] and report.shape == "preference"


def test_the_wrong_shape_names_what_fits(tmp_path: Path) -> None:
    path = tiny.write_rows(tmp_path / "a.jsonl", tiny.marked_rows(12))
    uses = {"unpaired": ["kto"], "preference": ["dpo", "kto"]}
    report = check_file(path, purpose_shapes=("preference",), method="dpo", objectives=uses)
    assert report.n_problems == 1
    text = report.problems[0].message
    assert "marked good or bad" in text and "provided method=dpo" in text and "such rows: kto." in text
    assert text.endswith("'dpo' needs the format fine-tune-preference.")


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Tokenizer:
    return Tokenizer.load(tiny_model_dir)


def test_a_marked_answer_as_tokens(tokenizer: Tokenizer) -> None:
    """The same tokens and weights as the chat row, and its mark."""
    rows = tiny.marked_rows(4)
    marked = list(render_rows([convert("unpaired", r) for r in rows], tokenizer, shape="unpaired", max_length=200))
    chats = [FORMATS.load("prompt_completion").convert(r, 3) for r in rows]
    chat = list(render_rows(chats, tokenizer, shape="chat", max_length=200))
    for a, b, row in zip(marked, chat, rows, strict=True):
        assert a.examples[0].ids == b.examples[0].ids and a.examples[0].weights == b.examples[0].weights
        assert a.examples[0].wanted is row["label"] and b.examples[0].wanted is None


def test_a_pair_whose_answers_end_up_the_same_is_left_out(tokenizer: Tokenizer) -> None:
    """By cutting: the answers differ only behind the limit."""
    rows = tiny.pair_rows(3)
    long = "It is so. " * 12
    rows[1]["preferred_output"][0]["content"] = f"{long} Yes."
    rows[1]["non_preferred_output"][0]["content"] = f"{long} No."
    report = RenderReport()
    conversations = [FORMATS.load("openai_dpo").convert(json.loads(json.dumps(r)), i) for i, r in enumerate(rows, 1)]
    groups = list(render_rows(conversations, tokenizer, shape="preference", max_length=60, overlong="truncate",
                              report=report))  # fmt: skip
    assert [g.examples[0].source for g in groups] == [1, 3]
    assert report.equal == 1 and any("tokens of both answers are the same" in note for note in report.notes)
