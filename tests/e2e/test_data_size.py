"""Memory is flat in the size of the data: twenty times the rows take the same, from the check to the last step."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import Machine

import tiny
from tunewright.core.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.nightly]


def peak(machine: Machine, n: int) -> tuple[Run, int]:
    machine.train = tiny.write_rows(machine.train, tiny.sft_rows(n))
    run = machine.new_run(n_epochs=1, batch_size=128, micro_batch_tokens=512, eval_every=1000, save_every_steps=1000)
    machine.finish(run)
    end = run.end()
    assert end is not None
    return run, end.data["peak_memory_bytes"]


def test_twenty_times_the_rows_need_the_same_memory(tmp_path: Path, tiny_model_dir: Path) -> None:
    """As lists of Python objects the larger file's tokens alone would take more than 30 MB."""
    machine = Machine(tmp_path / "home", tiny_model_dir)
    try:
        (_, small), (run, large) = peak(machine, 500), peak(machine, 10_000)
    finally:
        machine.close()
    assert (run.plan() or {})["n_rows"] == 10_000
    assert large - small < 12e6, f"{small:,} and {large:,} bytes"
