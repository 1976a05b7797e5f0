"""A job knows its memory and time before step 1: it is refitted into what is there, or refused with the numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from faults import Machine, story

from tunewright.core.errors import OutOfMemory

pytestmark = pytest.mark.slow
LARGE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 4096}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """With a model large enough that its activations are more than the process itself varies by."""
    import tiny

    folder = tiny.build_tiny_model(tmp_path_factory.mktemp("model") / "large", **LARGE)
    made = Machine(tmp_path_factory.mktemp("preflight"), folder)
    rows = [{"messages": [{"role": "user", "content": "count " * 60}, {"role": "assistant", "content": "on " * 60}]}]
    made.train = tiny.write_rows(made.train, rows * 12)
    yield made
    made.close()


JOB = {"n_epochs": 1, "batch_size": 6, "micro_batch_tokens": 2048, "save_every_steps": 100, "path": "plain"}


def test_predicted_and_measured_are_close_and_the_base_is_known(machine: Machine) -> None:
    run = machine.new_run(**JOB)
    machine.finish(run)
    end, plan = run.end(), run.plan()
    assert end is not None and plan is not None
    assert end.data["predicted_peak_memory_bytes"] == pytest.approx(end.data["peak_memory_bytes"], rel=0.15)
    assert 0 < plan["predicted_seconds"] == end.data["predicted_seconds"]
    assert plan["base"]["source"] == "validation" and plan["base"]["loss"] > 0
    assert any(e.message.startswith("Before training: loss=") for e in run.events())


def test_what_does_not_fit_is_refitted_and_gives_the_same(machine: Machine) -> None:
    free = machine.new_run(**JOB)
    machine.finish(free)
    plan = free.plan() or {}
    needed = int(plan["peak_memory_bytes"] * 0.8)
    tight = machine.new_run(**JOB, max_memory=str(needed))
    machine.finish(tight)
    smaller, end = tight.plan() or {}, tight.end()
    assert end is not None
    assert (smaller["micro_batch_tokens"], smaller["checkpointing"]) != (2048, "none")
    assert smaller["available_memory_bytes"] < needed
    assert end.data["peak_memory_bytes"] < needed
    assert any(e.message.startswith("To fit into") for e in tight.events())
    for a, b in zip(story(free)[0], story(tight)[0], strict=True):
        assert a[1] == pytest.approx(b[1], abs=1e-3)


def test_what_can_never_fit_is_refused_before_step_1(machine: Machine) -> None:
    run = machine.new_run(**JOB, max_memory="460MB")
    assert machine.attempt(run) == OutOfMemory.exit_code
    end = run.end()
    assert end is not None and end.data["code"] == "out_of_memory"
    for part in ("does not fit into memory", "GB", "max_memory 460MB", "What would fit"):
        assert part in end.data["message"], end.data["message"]
    assert not any(e.type == "metrics" for e in run.events()) and run.plan() is None
