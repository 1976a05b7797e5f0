"""Halvings and roll-backs as plan.json records them, and who obeys them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tunewright.core.errors import Diverged, OutOfMemory, RollBack, is_out_of_memory
from tunewright.core.events import EventWriter
from tunewright.core.example import Example, Group
from tunewright.core.run import Run
from tunewright.train.checkpoint import State
from tunewright.train.plan import Plan, micro_tokens, rate_factor
from tunewright.train.recovery import roll_back, skip, with_room

GROUPS = [Group((Example((1,) * n, (1.0,) * n, i + 1),)) for i, n in enumerate((40, 30, 20, 10))]
TORCH_TEXT = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"


def make(folder: Path) -> tuple[Run, Plan, EventWriter]:
    plan = Plan(
        n_rows=4, n_valid_rows=0, n_tokens=100, n_epochs=1, batch_size=4, total_steps=9, learning_rate=1e-3,
        learning_rate_multiplier=1.0, seed=0, dtype="float32", threads=1, micro_batch_tokens=2048, eval_every=1,
        max_length=512, parameters=10, trainable_parameters=5,
    )  # fmt: skip
    return Run(folder), plan, EventWriter(folder / "attempts" / "1" / "events.jsonl", 1)


def limited(room: int, calls: list[int], error: type[Exception] = RuntimeError) -> Any:
    def compute(tokens: int) -> int:
        calls.append(tokens)
        if tokens > room:
            raise error(TORCH_TEXT)
        return tokens

    return compute


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "error", [RuntimeError, pytest.param(MemoryError, marks=SLOW), pytest.param(torch.OutOfMemoryError, marks=SLOW)]
)
def test_half_the_micro_batch_until_it_fits(tmp_path: Path, error: type[Exception]) -> None:
    run, plan, events = make(tmp_path)
    calls: list[int] = []
    assert with_room(run, plan, events, 3, "train", GROUPS, limited(30, calls, error)) == 25
    assert calls == [2048, 50, 25]  # all four have 100 tokens, so half of that is the first that changes anything
    assert (run.plan() or {})["halvings"] == [
        {"step": 3, "where": "train", "micro_batch_tokens": 50},
        {"step": 3, "where": "train", "micro_batch_tokens": 25},
    ]


@pytest.mark.slow
def test_a_later_attempt_obeys_each_halving_from_its_moment_on(tmp_path: Path) -> None:
    run, plan, events = make(tmp_path)
    with_room(run, plan, events, 5, "valid", GROUPS, limited(60, []))
    with_room(run, plan, events, 7, "train", GROUPS, limited(40, []))
    again = Plan(**(run.plan() or {}))
    sizes = [(s, w, micro_tokens(again, s, w)) for s in (4, 5, 6, 7, 8) for w in ("train", "valid")]
    assert [size for *_, size in sizes] == [2048, 2048, 2048, 50, 50, 50, 25, 25, 25, 25]


@pytest.mark.slow
def test_with_one_group_a_micro_batch_it_fails_with_the_numbers(tmp_path: Path) -> None:
    run, plan, events = make(tmp_path)
    with pytest.raises(OutOfMemory, match=r"step 2 .*only one row \(the largest has 40 tokens"):
        with_room(run, plan, events, 2, "train", GROUPS, limited(0, []))


def test_tokens_in_front_of_each_row_count_when_it_is_halved(tmp_path: Path) -> None:
    run, plan, events = make(tmp_path)
    calls: list[int] = []
    with pytest.raises(OutOfMemory, match=r"only one row \(the largest has 140 tokens"):
        with_room(run, plan, events, 2, "train", GROUPS, limited(0, calls), virtual=100)
    assert calls == [2048, 250, 125]  # then a row each; without those tokens it would try on down to 40


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path: Path) -> None:
    run, plan, events = make(tmp_path)

    def wrong(tokens: int) -> int:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        with_room(run, plan, events, 2, "train", GROUPS, wrong)
    assert plan.halvings == [] and not is_out_of_memory(ValueError("out of memory"))


def test_two_updates_are_skipped_the_third_rolls_back_with_all_rows(tmp_path: Path) -> None:
    run, plan, events = make(tmp_path)
    for step in (2, 4):
        run.checkpoint(step).mkdir(parents=True)
    state = State(step=4)
    skip(run, plan, events, state, 4, [1, 2])
    skip(run, plan, events, state, 5, [2, 3])
    with pytest.raises(RollBack, match="step 2 "):
        skip(run, plan, events, state, 6, [9])
    (record,) = (run.plan() or {})["rollbacks"]
    assert (record["step"], record["to"], record["rows"]) == (6, 2, [1, 2, 3, 9])
    assert not run.checkpoint(4).exists() and run.checkpoint(2).exists()
    assert [rate_factor(plan, s) for s in (2, 3, 9)] == [1.0, 0.5, 0.5]


def test_a_checkpoint_is_gone_back_to_once_and_a_third_time_is_the_end(tmp_path: Path) -> None:
    run, plan, events = make(tmp_path)
    for step in (2, 4):
        run.checkpoint(step).mkdir(parents=True)
    for expected in (4, 2):
        with pytest.raises(RollBack):
            roll_back(run, plan, events, 6, 8, "the loss is far above its median", [5])
        assert plan.rollbacks[-1]["to"] == expected
    assert [rate_factor(plan, s) for s in (2, 3, 5)] == [1.0, 0.5, 0.25]
    with pytest.raises(Diverged, match=r"rows \[5\]") as e:
        roll_back(run, plan, events, 6, 8, "the loss is far above its median", [5])
    assert not isinstance(e.value, RollBack)
