"""A job that meets trouble ends well: less memory, numbers that are lost, a full disk. Real processes, tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import STEPS, Machine, story, warnings

from tunewright.core.errors import DiskFull, Diverged, OutOfMemory

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[Machine]:
    made = Machine(tmp_path_factory.mktemp("faults"), tiny_model_dir)
    yield made
    made.close()


def test_memory_that_runs_out_changes_nothing_but_the_cut(machine: Machine) -> None:
    whole, cut = machine.new_run(), machine.new_run()
    machine.finish(whole)
    machine.finish(cut, oom=[7, 130])
    plan = cut.plan() or {}
    assert plan["batch_size"] == 4 and plan["micro_batch_tokens"] == 256
    assert plan["halvings"][0]["where"] == "train" and plan["halvings"][0]["step"] >= 7
    for a, b in zip(story(whole)[0], story(cut)[0], strict=True):
        assert [x for x in a if x is not None] == pytest.approx([x for x in b if x is not None], abs=2e-4)
    assert story(whole)[0][:6] == story(cut)[0][:6]
    assert any("Memory ran out in step" in text for text in warnings(cut))


def test_no_memory_even_for_one_row_fails_with_the_numbers(machine: Machine) -> None:
    run = machine.new_run()
    assert machine.attempt(run, oom=[3, 10]) == OutOfMemory.exit_code
    end = run.end()
    assert end is not None and end.data["code"] == "out_of_memory"
    assert "step 3" in end.data["message"] and "only one row" in end.data["message"]
    assert [e.data["step"] for e in run.events() if e.type == "metrics"] == [1, 2]


def test_one_step_without_numbers_is_skipped(machine: Machine) -> None:
    run = machine.new_run()
    machine.finish(run, nan=[5])
    steps = story(run)[0]
    assert len(steps) == STEPS and [s[0] for s in steps if s[1] is None] == [5]
    assert any(text.startswith("Step 5 was skipped") for text in warnings(run))
    assert (run.plan() or {})["rollbacks"] == []


def test_three_steps_without_numbers_roll_back_and_a_kill_changes_nothing(machine: Machine) -> None:
    run = machine.new_run()
    machine.finish(run, nan=[7, 8, 9])
    (record,) = (run.plan() or {})["rollbacks"]
    assert (record["step"], record["to"], record["lr_factor"]) == (9, 6, 0.5) and record["rows"]
    steps = story(run)[0]
    assert [s[0] for s in steps] == list(range(1, STEPS + 1)) and all(s[1] is not None for s in steps)
    undisturbed = machine.new_run()
    machine.finish(undisturbed)
    rates = [s[4] for s in story(undisturbed)[0]]
    assert [s[4] for s in steps] == [r * (0.5 if i > 6 else 1) for i, r in enumerate(rates, 1)]
    again = machine.new_run()
    assert machine.attempt(again, nan=[7, 8, 9], kill=["pack", 30]) == -9
    machine.finish(again, nan=[7, 8, 9])
    assert story(again) == story(run)


def test_numbers_lost_for_good_fail_with_the_rows(machine: Machine) -> None:
    run = machine.new_run()
    steps = list(range(7, STEPS + 1))
    assert machine.attempt(run, nan=steps, nan_always=True) == Diverged.exit_code
    records = (run.plan() or {})["rollbacks"]
    assert [r["to"] for r in records] == [6, 4]
    end = run.end()
    assert end is not None and end.data["code"] == "diverged" and "rows [" in end.data["message"]


def test_losses_that_explode_roll_back(machine: Machine) -> None:
    """Far above the median from step 11 on: a warning after three, back to before them after eight."""
    run = machine.new_run(n_epochs=5)
    machine.finish(run, spike=[13, 30, 40])
    (record,) = (run.plan() or {})["rollbacks"]
    assert record["step"] == 20 and record["to"] == 12 and "loss is far above" in record["why"]
    assert any("may be diverging" in text for text in warnings(run))
    assert len(story(run)[0]) == 30


@pytest.mark.parametrize("fault", [{"disk": 25}, {"disk": 60}, {"disk_events": 30}])
def test_a_full_disk_pauses_and_the_job_goes_on_exactly(machine: Machine, fault: dict[str, int]) -> None:
    expected = machine.new_run()
    machine.finish(expected)
    run = machine.new_run()
    assert machine.attempt(run, **fault) == DiskFull.exit_code
    machine.finish(run)
    assert story(run) == story(expected)
