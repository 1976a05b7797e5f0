"""Chains under the supervisor, with worker processes that keep the run-folder protocol but train nothing."""

from __future__ import annotations

import io
import json
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from jobs_kit import FAKE, add_base, dump, get, make_job, messages, open_store, status_is, supervisor, until
from rich.console import Console

from tunewright.cli.chain import train_chain
from tunewright.core.chain import parse_chain
from tunewright.core.durable import Lock
from tunewright.core.errors import Busy, StateError
from tunewright.core.events import EventWriter
from tunewright.core.home import Home
from tunewright.core.run import Run
from tunewright.jobs import chains, space
from tunewright.jobs.chain import child_id, create_chain
from tunewright.jobs.foreground import row_of
from tunewright.jobs.launchers import Launcher, local
from tunewright.jobs.rows import JobRow
from tunewright.jobs.store import Store
from tunewright.jobs.supervisor import Supervisor

RAW: dict[str, Any] = {
    "model": "base-1b",
    "training_file": "file-a",
    "stages": [
        {"name": "a"},
        {"name": "b", "training_file": "file-b"},
        {"name": "c", "training_file": "file-c", "objective": {"name": "dpo", "beta": 0.2}},
    ],
}
NAMES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"objective": {"sft": {"card": {"openai_method": "supervised"}}, "dpo": {"card": {"openai_method": "dpo"}}}}
    monkeypatch.setattr(chains, "load_describe", lambda home: known)


@pytest.fixture
def store(home: Home) -> Iterator[Store]:
    opened = open_store(home)
    yield opened
    for run in (opened.run(job_id) for job_id in opened.job_ids()):
        local.signal_group(run, signal.SIGKILL)
    opened.close()


def chain_run(home: Home) -> Run:
    """The folder of a chain of three stages, each with a file of its own."""
    add_base(home)
    paths = {}
    for name in NAMES:
        paths[f"{name}/train"] = home.root / f"{name}.jsonl"
        paths[f"{name}/train"].write_text(f'{{"messages": ["{name}"]}}\n')
    return create_chain(home, parse_chain(RAW), paths=paths)


def add_chain(store: Store) -> Run:
    """A chain as the API makes it."""
    run = chain_run(store.home)
    store.add_job(replace(row_of(run), status="validating_files", started_by="api"))
    return run


def boss_of(store: Store, scripts: dict[str, Any] | None = None, **options: Any) -> Supervisor:
    """scripts: how the workers of a stage behave."""

    def start(run: Run, home: Home) -> subprocess.Popen[bytes]:
        script = {"steps": 4, "per_epoch": 2, **(scripts or {}).get(run.job().chain.get("stage", ""), {})}
        if not (run.folder / "script.json").exists():
            (run.folder / "script.json").write_text(json.dumps(script))
        return FAKE.start(run, home)

    return supervisor(store, Launcher(start, FAKE.leader_alive, FAKE.alive, FAKE.signal), **options)


def jobs_of(store: Store, run: Run) -> dict[str, JobRow]:
    return chains.children(store, run.id, run.job().stages)


def told(store: Store, run: Run) -> list[tuple[str, str]]:
    """(stage, status) as the chain's own row tells it."""
    return [(s["name"], s["status"]) for s in (get(store, run).tunewright or {})["stages"]]


def has(store: Store, run: Run, stage: str, *statuses: str) -> Any:
    return lambda: (job := jobs_of(store, run).get(stage)) is not None and job.status in statuses


def test_a_chain_from_create_to_succeeded(store: Store) -> None:
    run, other = add_chain(store), make_job(store, {"steps": 3})
    boss = boss_of(store)
    assert told(store, run) == [(name, "waiting") for name in NAMES]
    until(boss, status_is(store, run, "succeeded", "failed"))
    until(boss, status_is(store, other, "succeeded"))
    chain, jobs = get(store, run), jobs_of(store, run)
    assert chain.error is None and chain.status == "succeeded"
    assert [j.status for j in jobs.values()] == ["succeeded"] * 3
    assert [j.model for j in jobs.values()] == ["base-1b", jobs["a"].name, jobs["b"].name]
    assert [j.training_file for j in jobs.values()] == ["file-a", "file-b", "file-c"]
    assert [j.suffix for j in jobs.values()] == list(NAMES)
    assert [store.run(j.id).job().start for j in jobs.values()] == [None, "start", "start"]
    for name, job in jobs.items():
        here = store.run(job.id)
        assert json.loads((here.folder / here.job().train).read_text()) == {"messages": [name]}
        assert job.tunewright is not None and job.tunewright["chain"] == {"id": run.id, "stage": name}
    assert jobs["c"].method == {"type": "dpo", "dpo": {"hyperparameters": jobs["c"].hyperparameters}}
    assert told(store, run) == [(name, "succeeded") for name in NAMES]
    assert (chain.tunewright or {})["stages"][-1]["fine_tuned_model"] == jobs["c"].name
    assert chain.trained_tokens == 1200 and len(chain.result_files) == 3
    assert messages(store, run)[3:] == [
        *(f"Stage {i} of 3, '{name}', has begun: {jobs[name].id}" for i, name in enumerate(NAMES, 1)),
        f"New fine-tuned model created: {jobs['c'].name}",
        "The job has successfully completed",
    ]
    before = dump(store)
    store.rebuild()
    assert dump(store) == before
    with pytest.raises(StateError, match="only a paused or failed one can be resumed"):
        boss.resume(run.id)


def test_a_failure_in_stage_3_does_not_repeat_stages_1_and_2(store: Store) -> None:
    run = add_chain(store)
    scripts = {"c": {"exit_at": {"1": [2, 72]}}}
    boss = boss_of(store, scripts)
    until(boss, status_is(store, run, "failed"))
    chain, before = get(store, run), jobs_of(store, run)
    assert chain.error == {
        "code": "diverged",
        "message": "Stage 3 of 3, 'c', did not succeed. gave up: diverged. The stages before it are kept. Resume the "
        "chain to do this stage again.",
        "param": None,
    }
    assert chain.finished_at is not None
    boss.tick()
    assert get(store, run) == chain
    scripts.clear()
    boss.resume(run.id)
    until(boss, status_is(store, run, "succeeded", "failed"))
    after = jobs_of(store, run)
    assert get(store, run).status == "succeeded" and get(store, run).error is None
    assert (after["a"], after["b"]) == (before["a"], before["b"])
    assert after["c"].id == child_id(run.id, "c", 2) and before["c"].id == child_id(run.id, "c", 1)
    assert {j.id for j in store.list_jobs(limit=100).data} == {run.id, *(j.id for j in (*after.values(), before["c"]))}


def test_pause_and_resume_reach_the_stage_that_runs(store: Store) -> None:
    run = add_chain(store)
    boss = boss_of(store, {"b": {"hold": {"1": [2]}}})
    until(boss, has(store, run, "b", "running"))
    until(boss, lambda: store.metric_points(jobs_of(store, run)["b"].id))
    boss.pause(run.id)
    until(boss, status_is(store, run, "paused"))
    assert jobs_of(store, run)["b"].status == "paused" and told(store, run)[1] == ("b", "paused")
    for _ in range(3):
        boss.tick()
    assert get(store, run).status == "paused" and "c" not in jobs_of(store, run)
    boss.resume(run.id)
    until(boss, status_is(store, run, "succeeded", "failed"))
    assert get(store, run).status == "succeeded" and jobs_of(store, run)["b"].attempt == 2


@pytest.mark.slow
def test_a_stage_in_the_queue_is_held_and_one_resumed_by_itself_takes_the_chain_along(store: Store) -> None:
    first = make_job(store, {"hold": {"1": [1]}})
    boss = boss_of(store)
    until(boss, status_is(store, first, "running"))
    run = add_chain(store)
    until(boss, has(store, run, "a", "queued"))
    boss.pause(run.id)
    until(boss, status_is(store, run, "paused"))
    boss.cancel(first.id)
    until(boss, status_is(store, first, "cancelled"))
    boss.tick()
    assert jobs_of(store, run)["a"].status == "paused"
    boss.resume(jobs_of(store, run)["a"].id)
    until(boss, status_is(store, run, "succeeded", "failed"))
    assert get(store, run).status == "succeeded"


@pytest.mark.parametrize("paused", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_cancel_ends_the_stage_and_then_the_chain(store: Store, paused: bool) -> None:
    run = add_chain(store)
    boss = boss_of(store, {"b": {"hold": {"1": [2]}}})
    until(boss, has(store, run, "b", "running"))
    until(boss, lambda: store.metric_points(jobs_of(store, run)["b"].id))
    if paused:
        boss.pause(run.id)
        until(boss, status_is(store, run, "paused"))
    boss.cancel(run.id)
    until(boss, status_is(store, run, "cancelled"))
    assert told(store, run) == [("a", "succeeded"), ("b", "cancelled"), ("c", "waiting")]
    with pytest.raises(StateError, match="has already been cancelled"):
        boss.cancel(run.id)
    with pytest.raises(StateError, match="is cancelled; only a paused or failed one"):
        boss.resume(run.id)


@pytest.mark.slow
def test_a_stage_that_waits_for_the_disk_or_is_cancelled(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = add_chain(store)
    boss = boss_of(store, {"a": {"exit_at": {"1": [2, 73]}}, "b": {"hold": {"1": [2]}}})
    with monkeypatch.context() as full:
        full.setattr(space, "enough", lambda *_: False)
        until(boss, status_is(store, run, "paused"))
        assert (get(store, run).error or {})["code"] == "disk_full"
        assert messages(store, run)[-1] == "Stage 1 of 3, 'a', is paused. gave up: disk_full"
        with pytest.raises(StateError, match="The disk is still full"):
            boss.resume(run.id)
        assert get(store, run).status == "paused"
    boss.resume(run.id)
    until(boss, has(store, run, "b", "running"))
    boss.cancel(jobs_of(store, run)["b"].id)
    until(boss, status_is(store, run, "failed"))
    error = get(store, run).error or {}
    assert error["code"] == "stage_cancelled"
    assert "Its job was cancelled. The stages before it are kept." in error["message"]


class PowerCut(BaseException):
    """Nothing catches it."""


@pytest.mark.parametrize("when", ["before the row", "after the row"])
@pytest.mark.parametrize("stage", [pytest.param("a", marks=pytest.mark.slow), "c"])
def test_a_power_cut_while_a_stage_is_made_makes_one_job(
    home: Home, monkeypatch: pytest.MonkeyPatch, when: str, stage: str
) -> None:
    store = open_store(home)
    run, real = add_chain(store), Store.add_job

    def cut(self: Store, row: JobRow) -> None:
        if row.suffix != stage:
            return real(self, row)
        if when == "after the row":
            real(self, row)
        raise PowerCut

    monkeypatch.setattr(Store, "add_job", cut)
    with pytest.raises(PowerCut):
        until(boss_of(store), lambda: False)
    monkeypatch.setattr(Store, "add_job", real)
    store.close()
    opened = Store.open(home)
    try:
        boss = boss_of(opened)
        until(boss, status_is(opened, run, "succeeded", "failed"))
        assert get(opened, run).status == "succeeded"
        assert len(opened.list_jobs(limit=100).data) == 4
        begun = [m for m in messages(opened, run) if "has begun" in m]
        assert len(begun) == len(set(begun)) == 3
    finally:
        opened.close()


@pytest.mark.slow
def test_a_model_that_was_deleted_between_two_stages(store: Store) -> None:
    run = add_chain(store)
    boss = boss_of(store)
    until(boss, has(store, run, "a", "succeeded"))
    store.delete_model(jobs_of(store, run)["a"].name)
    until(boss, status_is(store, run, "failed", "succeeded"))
    error = get(store, run).error or {}
    assert error["code"] == "model_not_found" and "Stage 2 of 3, 'b', cannot begin. The model 'ft:" in error["message"]


def test_a_chain_that_a_terminal_drives_is_shown_and_taken_over_when_resumed(store: Store) -> None:
    run = chain_run(store.home)
    events = EventWriter(run.attempt(1) / "events.jsonl", 1)
    events.write("message", "Stage 1 of 3, 'a', has begun: ftjob-a")
    events.close()
    boss = boss_of(store)
    with Lock(run.lock):
        boss.tick()
        boss.tick()
        assert get(store, run).status == "running" and jobs_of(store, run) == {}
    until(boss, status_is(store, run, "paused"))
    assert messages(store, run)[-2:] == [
        "Stage 1 of 3, 'a', has begun: ftjob-a",
        "The chain was stopped in the terminal; it can be resumed.",
    ]
    boss.resume(run.id)
    until(boss, status_is(store, run, "succeeded", "failed"))
    assert get(store, run).status == "succeeded"


def test_a_terminal_leaves_the_servers_chain_alone(store: Store) -> None:
    run = add_chain(store)
    with pytest.raises(Busy, match=f"The chain {run.id} is under way in the server"):
        train_chain(store.home, run, Console(file=io.StringIO()))
    assert run.attempts() == [0] and not run.is_active()
