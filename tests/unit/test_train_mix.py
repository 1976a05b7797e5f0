"""Mixing: quotas by size, temperature or weights; every row in turn; a function of (seed, epoch)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tunewright.core.errors import SpecError
from tunewright.core.example import Example, Group
from tunewright.core.spec import Mix, extra_files, parse_spec
from tunewright.data.rendered import JoinedGroups, StoredGroups, sizes, write_groups
from tunewright.train.mix import mixed_rows, quotas, rows_in_turn
from tunewright.train.plan import epoch_rows, resolve, step_rows
from tunewright.tuners.lora import LoRA


def mix(**fields: object) -> Mix:
    return Mix.model_validate({"files": ["b", "c"], **fields})


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0, 100.0])
def test_quotas_are_n_to_the_power_of_one_over_t(temperature: float) -> None:
    counts = [1000, 100, 10]
    got = np.array(quotas(counts, mix(temperature=temperature)))
    power = np.array(counts, float) ** (1 / temperature)
    assert got.sum() == 1110 and np.abs(got - 1110 * power / power.sum()).max() < 1
    if temperature == 1:
        assert got.tolist() == counts


def test_weights_are_the_shares_and_1_where_one_is_missing() -> None:
    asked = Mix.model_validate({"weight": 2, "files": [{"file": "b", "weight": 1}, "c"]})
    assert quotas([10, 10, 80], asked) == [50, 25, 25]
    assert quotas([3, 3], Mix.model_validate(["b"])) == [3, 3]


def test_every_row_comes_once_before_any_comes_again() -> None:
    files = ((7, 3), (4, 10), (5, 5))
    seen: Counter[int] = Counter()
    starts, passed = (0, 7, 11), []
    for epoch in range(7):
        rows = mixed_rows(files, 3, epoch)
        assert len(rows) == 18
        passed.append(rows)
        seen.update(rows.tolist())
        for start, (n, quota) in zip(starts, files, strict=True):
            of_file = [seen[start + i] for i in range(n)]
            assert max(of_file) - min(of_file) <= 1 and sum(of_file) == quota * (epoch + 1)
    assert any(not np.array_equal(passed[0], p) for p in passed[1:])
    assert np.array_equal(mixed_rows(files, 3, 2), passed[2])
    assert not np.array_equal(mixed_rows(files, 4, 2), passed[2])


def stored(folder: Path, n: int, length: int) -> StoredGroups:
    folder.mkdir()
    groups = [Group((Example(tuple(range(length)), (0.0, *[1.0] * (length - 1)), i + 1),)) for i in range(n)]
    write_groups(folder, groups)
    return StoredGroups(folder)


def test_joined_groups_and_the_plan_over_them(tmp_path: Path) -> None:
    a, b = stored(tmp_path / "a", 9, 4), stored(tmp_path / "b", 3, 10)
    groups = JoinedGroups([a, b])
    assert len(groups) == 12 and groups.counts == [9, 3]
    assert [len(groups[i].examples[0].ids) for i in (0, 8, 9, 11, -1)] == [4, 4, 10, 10, 10]
    assert [g.examples[0].source for g in groups[7:11]] == [8, 9, 10, 11]
    assert np.array_equal(sizes(groups), np.concatenate([a.sizes, b.sizes]))
    with pytest.raises(IndexError):
        groups[12]
    fields = {"model": "m", "training_file": "a", "batch_size": 5, "n_epochs": 2, "seed": 1}
    spec = parse_spec({**fields, "mix": {"files": ["b"], "weight": 1}})
    plan = resolve(
        spec, groups, [], LoRA.card, dtype="float32", threads=1, context=99, parameters=1, trainable=1, versions={}
    )
    assert plan.mix == [[9, 6], [3, 6]] and plan.n_rows == 12 and plan.total_steps == 6
    assert plan.n_tokens == 6 * 4 + 6 * 10
    for epoch in range(2):
        rows = [i for k in range(3) for i in step_rows(plan, epoch * 3 + k + 1)]
        assert rows == epoch_rows(plan, epoch).tolist()
        assert Counter(i >= 9 for i in rows) == {False: 6, True: 6}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"files": []}, "at least 1 item"),
        ({"files": ["b"], "weight": 1, "temperature": 2}, "give one of them"),
        ({"files": ["b"], "temperature": 0}, "greater than 0"),
        ({"files": [{"file": "b", "share": 1}]}, "share"),
        ("b.jsonl", "mix"),
    ],
)
def test_a_wrong_mix_is_refused(value: object, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        parse_spec({"model": "m", "training_file": "a", "mix": value})


def test_files_have_roles() -> None:
    retain = [{"name": "l2sp"}, {"name": "replay", "file": "old"}, {"name": "kl", "file": None}]
    spec = parse_spec({"model": "m", "training_file": "a", "mix": ["b", {"file": "c"}], "retain": retain})
    assert extra_files(spec) == {"retain-2": "old", "mix-1": "b", "mix-2": "c"}
    assert parse_spec({"model": "m", "training_file": "a", "retain": "l2sp"}).retain[0].name == "l2sp"
    assert extra_files(parse_spec({"model": "m", "training_file": "a"})) == {}


def test_in_turn_all_epochs_of_a_file_come_before_the_next(tmp_path: Path) -> None:
    """The same rows, as often, in the same order within a file, as when they are shuffled."""
    files, epochs = ((7, 3), (4, 10), (5, 5)), 5
    shuffled = np.concatenate([mixed_rows(files, 3, e) for e in range(epochs)])
    turned = np.concatenate([rows_in_turn(files, 3, e, epochs) for e in range(epochs)])
    file_of = np.repeat([0, 1, 2], [7, 4, 5])
    assert all(len(rows_in_turn(files, 3, e, epochs)) == 18 for e in range(epochs))
    assert np.array_equal(file_of[turned], np.repeat([0, 1, 2], [15, 50, 25]))
    assert all(np.array_equal(shuffled[file_of[shuffled] == i], turned[file_of[turned] == i]) for i in range(3))

    groups = JoinedGroups([stored(tmp_path / "a", 9, 4), stored(tmp_path / "b", 3, 10)])
    spec = parse_spec({
        "model": "m", "training_file": "a", "batch_size": 5, "n_epochs": 2, "seed": 1,
        "mix": {"files": ["b"], "order": "in_turn"},
    })  # fmt: skip
    plan = resolve(
        spec, groups, [], LoRA.card, dtype="float32", threads=1, context=99, parameters=1, trainable=1, versions={}
    )
    rows = [i for step in range(1, plan.total_steps + 1) for i in step_rows(plan, step)]
    assert [i >= 9 for i in rows] == [False] * 18 + [True] * 6
    assert plan.n_tokens == 9 * 4 + 3 * 10  # of an epoch, the mean
