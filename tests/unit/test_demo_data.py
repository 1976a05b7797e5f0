"""The demo data set keeps its promises: shape, labels, balance, no copies between training and held-out rows."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from tunewright.data.demo import DEPARTMENTS, HELDOUT, TRAIN, URGENCIES, ClinicRow, load
from tunewright.data.validate import check_file

WORD = re.compile(r"[a-z0-9]+")


def five_grams(text: str) -> set[tuple[str, ...]]:
    """Runs of five words in lower case without punctuation; a shorter text is one run."""
    words = WORD.findall(text.lower().replace("'", ""))
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def overlap(row: ClinicRow, others: list[set[tuple[str, ...]]]) -> float:
    """The largest share of the row's 5-grams found in any one of the others."""
    mine = five_grams(row.message)
    return max(len(mine & other) / len(mine) for other in others)


@pytest.fixture(scope="module")
def train() -> list[ClinicRow]:
    return load(TRAIN)


@pytest.fixture(scope="module")
def heldout() -> list[ClinicRow]:
    return load(HELDOUT)


def test_five_grams_see_a_copy_and_only_a_copy() -> None:
    text = "I fell off my bike, and now it's swollen badly"
    copy = ClinicRow(text.upper(), "", "", "", "")
    assert overlap(copy, [five_grams("something else entirely, this text is"), five_grams(text)]) == 1
    assert overlap(copy, [five_grams("I fell off my bike")]) == pytest.approx(1 / 6)
    assert overlap(ClinicRow("Too short", "", "", "", ""), [five_grams("too short")]) == 1


def test_sizes(train: list[ClinicRow], heldout: list[ClinicRow]) -> None:
    assert len(train) == 300
    assert len(heldout) == 100


def test_no_held_out_row_shares_more_than_half_of_its_five_grams(
    train: list[ClinicRow], heldout: list[ClinicRow]
) -> None:
    known = [five_grams(row.message) for row in train]
    near = {row.message: share for row in heldout if (share := overlap(row, known)) > 0.5}
    assert near == {}


def test_no_message_occurs_twice(train: list[ClinicRow], heldout: list[ClinicRow]) -> None:
    texts = [" ".join(WORD.findall(row.message.lower())) for row in train + heldout]
    assert [text for text, n in Counter(texts).items() if n > 1] == []


def test_training_messages_are_not_variants_of_each_other(train: list[ClinicRow]) -> None:
    """Written one by one, not from a template: no two share even a third of their 5-grams."""
    grams = [five_grams(row.message) for row in train]
    assert [(a, b) for a, b in combinations(grams, 2) if len(a & b) > min(len(a), len(b)) / 3] == []


@pytest.mark.parametrize("path", [TRAIN, HELDOUT], ids=["train", "heldout"])
def test_every_answer_is_the_json_object_in_one_form(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        user, assistant = json.loads(line)["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        value = json.loads(assistant["content"])
        assert list(value) == ["department", "urgency", "reason"]
        assert value["department"] in DEPARTMENTS and value["urgency"] in URGENCIES
        assert 1 <= len(value["reason"].split()) <= 8
        assert assistant["content"] == json.dumps(value)
        assert user["content"] == user["content"].strip() and user["content"].isascii()


@pytest.mark.parametrize("path", [TRAIN, HELDOUT], ids=["train", "heldout"])
def test_the_validator_accepts_the_file(path: Path) -> None:
    report = check_file(path)
    assert (report.n_problems, report.shape) == (0, "chat")


@pytest.mark.parametrize("path", [TRAIN, HELDOUT], ids=["train", "heldout"])
def test_departments_and_urgencies_are_balanced(path: Path) -> None:
    rows = load(path)
    departments = Counter(row.department for row in rows)
    assert set(departments) == set(DEPARTMENTS)
    assert max(departments.values()) <= 1.25 * min(departments.values())
    urgencies = Counter(row.urgency for row in rows)
    assert set(urgencies) == set(URGENCIES)
    assert min(urgencies.values()) >= 0.2 * len(rows)


def test_the_label_is_not_given_away_by_its_own_name(heldout: list[ClinicRow]) -> None:
    """Held-out messages do not contain the label they are to get."""
    told = [r.message for r in heldout if r.department in r.message.lower() or f"{r.urgency}" in r.message.lower()]
    assert told == []


def test_rows_come_in_mixed_order(train: list[ClinicRow], heldout: list[ClinicRow]) -> None:
    for rows in (train, heldout):
        changes = sum(a.department != b.department for a, b in pairwise(rows))
        assert changes > 0.7 * len(rows)
