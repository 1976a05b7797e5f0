"""The supervisor with real worker processes that keep the run-folder protocol but train nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from jobs_fake_worker import loss
from jobs_kit import (
    FAKE,
    at_step,
    dump,
    get,
    make_job,
    make_run,
    messages,
    open_store,
    status_is,
    supervisor,
    until,
    wait_for,
)

from tunewright.core.errors import Busy, DataError, DiskFull, NotFound, StateError
from tunewright.core.events import Event
from tunewright.core.home import Home
from tunewright.core.run import Run
from tunewright.jobs import space
from tunewright.jobs.launchers import local
from tunewright.jobs.store import Store

KIT = str(Path(__file__).parent)


@pytest.fixture
def store(home: Home) -> Iterator[Store]:
    opened = open_store(home)
    yield opened
    for run in (opened.run(job_id) for job_id in opened.job_ids()):
        local.signal_group(run, signal.SIGKILL)
    opened.close()


def pid_of(run: Run) -> int:
    return int((local._started(run) or {})["pid"])


def assert_whole(store: Store, run: Run, steps: int) -> None:
    """Every step is there once, with the loss that an undisturbed run has."""
    assert [(p["step"], p["train_loss"]) for p in store.metric_points(run.id)] == [
        (s, loss(s)) for s in range(1, steps + 1)
    ]
    assert [e for e in messages(store, run) if e.startswith("Step ")] == [
        f"Step {s}/{steps}: training loss={loss(s):.2f}" for s in range(1, steps + 1)
    ]


def test_a_job_from_create_to_succeeded(store: Store) -> None:
    run = make_job(store)
    boss = supervisor(store)
    seen = []
    until(boss, lambda: seen.append(get(store, run).status) or status_is(store, run, "succeeded")())
    assert [s for s in dict.fromkeys(seen) if s != "queued"] == ["validating_files", "running", "succeeded"]
    job = get(store, run)
    assert job.trained_tokens == 2000
    assert job.resolved == {"n_epochs": 2, "batch_size": 1, "total_steps": 20}
    assert job.finished_at is not None and job.estimated_finish is None and job.attempt == 1
    assert messages(store, run)[:3] == [
        f"Created fine-tuning job: {run.id}",
        "Validating training file: file-train",
        "Files validated, moving job to queued state",
    ]
    assert messages(store, run)[-1] == "The job has successfully completed"
    assert_whole(store, run, 20)
    [result] = job.result_files
    row = store.get_file(result)
    assert row is not None and (row.filename, row.purpose) == ("step_metrics.csv", "fine-tune-results")
    assert store.home.blob(row.sha256).read_text() == "step,train_loss\n"
    assert [(c.name, c.step) for c in store.list_checkpoints(run.id).data] == [
        (job.name, 20),
        (f"{job.name}:ckpt-step-10", 10),
    ]


def test_estimated_finish_comes_from_the_worker(store: Store) -> None:
    run = make_job(store, {"steps": 500, "hold": {"1": [2]}})
    boss = supervisor(store)
    until(boss, at_step(store, run, 2))
    assert abs((get(store, run).estimated_finish or 0) - time.time() - 4980) < 60


def test_jobs_run_one_after_the_other_in_order(store: Store) -> None:
    runs = [make_job(store, {"steps": 3}) for _ in range(3)]
    boss = supervisor(store)
    most = 0

    def done() -> bool:
        nonlocal most
        most = max(most, len(store.jobs_with({"running"})))
        return status_is(store, runs[2], "succeeded")()

    until(boss, done)
    assert most == 1
    starts = [r.attempt(1).stat().st_ctime_ns for r in runs]
    assert starts == sorted(starts)


def test_bad_data_fails_the_job_with_its_code(store: Store) -> None:
    def check(home: Home, run: Run) -> None:
        raise DataError("Training file has 3 example(s)", code="invalid_n_examples", param="training_file")

    run = make_job(store)
    until(supervisor(store, check=check), status_is(store, run, "failed"))
    error = {"code": "invalid_n_examples", "message": "Training file has 3 example(s)", "param": "training_file"}
    assert get(store, run).error == error
    last = store.list_events(run.id).data[0]
    assert (last.level, last.message, last.data) == ("error", error["message"], {"error_code": "invalid_n_examples"})
    assert run.attempts() == [0]


def test_kill_9_of_the_worker_resumes_without_lost_or_doubled_steps(store: Store) -> None:
    run = make_job(store, {"kill_at": {"1": 8, "2": 13}, "steps": 20})
    boss = supervisor(store)
    until(boss, status_is(store, run, "succeeded", "failed"))
    assert get(store, run).status == "succeeded" and get(store, run).attempt == 3
    assert_whole(store, run, 20)
    warnings = [e.message for e in store.list_events(run.id, limit=100).data if e.level == "warn"]
    assert warnings[::-1] == [
        f"The worker was killed by the signal SIGKILL. The job goes on from its checkpoint at step {s}."
        for s in (5, 10)
    ]


def test_three_crashes_without_progress_fail_the_job(store: Store) -> None:
    run = make_job(store, {"kill_at": {str(n): 2 for n in range(1, 9)}})
    until(supervisor(store), status_is(store, run, "failed"))
    assert run.attempts() == [0, 1, 2, 3, 4]
    error = get(store, run).error
    assert error is not None and error["code"] == "worker_crashed"
    assert "killed by the signal SIGKILL" in error["message"] and "micro_batch_tokens" in error["message"]


def test_progress_resets_the_count_of_crashes(store: Store) -> None:
    # each attempt gets five steps further before it dies
    run = make_job(store, {"kill_at": {str(n): 5 * n + 1 for n in range(1, 7)}, "steps": 35})
    until(supervisor(store), status_is(store, run, "succeeded", "failed"))
    assert get(store, run).status == "succeeded" and get(store, run).attempt == 7
    assert_whole(store, run, 35)


def test_a_crash_waits_before_the_next_attempt(store: Store) -> None:
    now = [1000.0]
    run = make_job(store, {"kill_at": {"1": 2}})
    boss = supervisor(store, clock=lambda: now[0], backoff=(30.0,))
    until(boss, lambda: get(store, run).retry)
    for _ in range(5):
        boss.tick()
    assert get(store, run).status == "queued" and run.attempts() == [0, 1]
    now[0] += 31
    until(boss, status_is(store, run, "succeeded"))


def test_an_error_that_the_worker_reports_is_not_tried_again(store: Store) -> None:
    run = make_job(store, {"exit_at": {"1": [4, 72]}})
    until(supervisor(store), status_is(store, run, "failed"))
    assert get(store, run).error == {"code": "diverged", "message": "gave up: diverged", "param": None}
    assert run.attempts() == [0, 1]


def test_a_worker_that_cannot_be_started_is_tried_again_then_fails(store: Store) -> None:
    def start(*_: object) -> subprocess.Popen[bytes]:
        raise OSError(errno.EMFILE, "Too many open files")

    run = make_job(store)
    until(supervisor(store, replace(FAKE, start=start)), status_is(store, run, "failed"))
    error = get(store, run).error or {}
    assert error["message"].startswith("The worker could not be started: Too many open files. This happened 4 times")
    assert run.attempts() == [0]


def test_no_space_to_start_in_pauses_the_job(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "enough", lambda *_: False)

    def start(*_: object) -> subprocess.Popen[bytes]:
        raise DiskFull("The disk is full: no room for the log.")

    run = make_job(store)
    until(supervisor(store, replace(FAKE, start=start)), status_is(store, run, "paused"))
    assert (get(store, run).error or {})["code"] == "disk_full"


def test_a_database_that_is_locked_for_a_moment_does_no_harm(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run, boss = make_job(store, {"steps": 3}), supervisor(store)
    locked = iter([True, True])
    take = store.catch_up

    def catch_up(job_id: str) -> list[Event]:
        if next(locked, False):
            raise Busy("The job database is locked.")
        return take(job_id)

    monkeypatch.setattr(store, "catch_up", catch_up)
    until(boss, status_is(store, run, "succeeded", "failed"))
    assert get(store, run).status == "succeeded"


@pytest.mark.slow
def test_what_a_dead_worker_left_is_killed_by_the_next_server(store: Store) -> None:
    run = make_job(store, {"delay": 0.02, "steps": 30, "child": True, "kill_at": {"1": 7}})
    until(supervisor(store), lambda: run.attempts() == [0, 1])
    wait_for(lambda: not local.leader_alive(run) and (run.folder / "child.pid").exists())
    assert local.worker_alive(run)  # its child holds on
    child = psutil.Process(int((run.folder / "child.pid").read_text()))
    boss = supervisor(store)
    until(boss, lambda: run.attempts() == [0, 1, 2])
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    until(boss, status_is(store, run, "succeeded"))
    assert_whole(store, run, 30)


def test_success_without_a_whole_result_is_no_success(store: Store) -> None:
    run = make_job(store, {"no_result": True, "steps": 3})
    until(supervisor(store), status_is(store, run, "failed", "succeeded"))
    assert get(store, run).status == "failed"
    assert "result is not whole" in (get(store, run).error or {})["message"]


def test_pause_saves_and_resume_goes_on(store: Store) -> None:
    run = make_job(store, {"hold": {"1": [7]}})
    boss = supervisor(store)
    until(boss, at_step(store, run, 7))
    asyncio.run(boss.request_pause(run.id))
    assert get(store, run).status == "pausing"
    until(boss, status_is(store, run, "paused"))
    assert not local.worker_alive(run)
    assert run.checkpoint(7).is_dir()
    for _ in range(3):
        boss.tick()
    assert get(store, run).status == "paused"
    asyncio.run(boss.request_resume(run.id))
    until(boss, status_is(store, run, "succeeded"))
    assert_whole(store, run, 20)
    said = messages(store, run)
    assert [m for m in said if "paused" in m or "job resumed" in m] == [
        "Fine-tuning job paused",
        "Fine-tuning job resumed",
    ]


def test_cancel_while_running_ends_the_whole_group(store: Store) -> None:
    run = make_job(store, {"hold": {"1": [2]}, "child": True})
    boss = supervisor(store)
    until(boss, at_step(store, run, 2))
    until(boss, (run.folder / "child.pid").exists)
    child = psutil.Process(int((run.folder / "child.pid").read_text()))
    boss.cancel(run.id)
    assert get(store, run).status == "cancelling"
    boss.cancel(run.id)  # asking twice is no error
    until(boss, status_is(store, run, "cancelled"))
    assert not local.worker_alive(run)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    job = get(store, run)
    assert job.finished_at is not None and job.intent is None and job.estimated_finish is None
    assert messages(store, run)[-1] == "Fine-tuning job cancelled"


def test_a_worker_that_ignores_sigterm_is_killed(store: Store) -> None:
    run = make_job(store, {"hold": {"1": [7]}, "ignore_term": True})
    boss = supervisor(store, patience={"pause": 0.3, "cancel": 0.3})
    until(boss, at_step(store, run, 7))
    boss.pause(run.id)
    until(boss, status_is(store, run, "paused"))
    assert "can be resumed from its last checkpoint" in messages(store, run)[-1]
    assert not local.worker_alive(run)


@pytest.mark.parametrize("status", ["validating_files", "queued", "paused"])
def test_cancel_without_a_worker_is_immediate(store: Store, status: str) -> None:
    run = make_job(store, status=status)
    boss = supervisor(store)
    boss.cancel(run.id)
    assert get(store, run).status == "cancelled"
    for _ in range(3):
        boss.tick()
    assert get(store, run).status == "cancelled" and run.attempts() == [0]


WRONG = [
    ("cancel", "succeeded", "has already succeeded"),
    ("cancel", "failed", "has already failed"),
    ("cancel", "cancelled", "has already been cancelled"),
    ("pause", "queued", "is queued; only a running job can be paused"),
    ("pause", "validating_files", "is validating its files"),
    ("pause", "paused", "is paused; only"),
    ("pause", "cancelling", "is cancelling; only"),
    ("pause", "succeeded", "is succeeded; only"),
    ("resume", "running", "is running; only a paused job can be resumed"),
    ("resume", "pausing", "saving a checkpoint; try again"),
    ("resume", "queued", "is queued; only"),
    ("resume", "cancelled", "is cancelled; only"),
]


@pytest.mark.parametrize(("ask", "status", "text"), WRONG)
def test_asking_in_the_wrong_state_is_one_clear_error(store: Store, ask: str, status: str, text: str) -> None:
    run = make_job(store, status=status)
    with pytest.raises(StateError, match=text):
        getattr(supervisor(store), ask)(run.id)
    assert get(store, run).status == status
    with pytest.raises(NotFound, match="Could not find fine tune: ftjob-x"):
        getattr(supervisor(store), ask)("ftjob-x")


def test_cancel_and_finish_at_the_same_time_leave_one_end(store: Store) -> None:
    run = make_job(store, {"steps": 1, "delay": 0})
    boss = supervisor(store)
    until(boss, status_is(store, run, "running"))
    wait_for(lambda: not local.worker_alive(run))
    boss.cancel(run.id)  # the worker has finished, the supervisor has not seen it
    until(boss, status_is(store, run, "cancelled", "succeeded"))
    assert get(store, run).status == "cancelled"
    assert get(store, run).result_files == []


def test_disk_full_pauses_and_resumes_when_there_is_space(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "enough", lambda *_: False)
    run = make_job(store, {"exit_at": {"1": [7, 73]}})
    boss = supervisor(store)
    until(boss, status_is(store, run, "paused"))
    assert (get(store, run).error or {})["code"] == "disk_full"
    with pytest.raises(StateError, match="disk is still full"):
        boss.resume(run.id)
    for _ in range(3):
        boss.tick()
    assert get(store, run).status == "paused"
    monkeypatch.setattr(space, "enough", lambda *_: True)
    until(boss, status_is(store, run, "succeeded"))
    assert get(store, run).error is None
    assert_whole(store, run, 20)


def test_a_full_disk_is_measured(home: Home) -> None:
    run = make_run(home)
    (run.checkpoint(5)).mkdir(parents=True)
    with open(run.checkpoint(5) / "big", "wb") as f:
        f.truncate(1 << 43)
    with pytest.raises(StateError, match=r"needs about 26388279 MB"):
        space.require(home, run)


SERVER = f"""
import asyncio, sys
sys.path.insert(0, {KIT!r})
from pathlib import Path
from jobs_kit import supervisor
from tunewright.core.home import Home
from tunewright.jobs.store import Store
store = Store.open(Home(Path(sys.argv[1])))
asyncio.run(supervisor(store, poll=0.02).run())
"""


def serve(home: Home) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SERVER, str(home.root)])


def last_step(run: Run) -> int:
    return max((e.data["step"] for e in run.all_events() if e.type == "metrics"), default=0)


@pytest.mark.slow
def test_kill_9_of_the_server_leaves_the_worker_and_the_next_one_takes_it_over(home: Home) -> None:
    store = Store.open(home)
    run = make_job(store, {"hold": {"1": [3, 30]}, "steps": 60})
    store.close()
    server = serve(home)
    try:
        wait_for(lambda: last_step(run) == 3)
    finally:
        server.kill()
        server.wait()
    worker = pid_of(run)
    (run.folder / "go-3").touch()
    wait_for(lambda: last_step(run) == 30)  # training goes on without a server
    store = Store.open(home)
    boss = supervisor(store)
    until(boss, at_step(store, run, 30))
    assert pid_of(run) == worker and get(store, run).status == "running"
    (run.folder / "go-30").touch()
    until(boss, status_is(store, run, "succeeded", "failed"))
    assert get(store, run).status == "succeeded" and get(store, run).attempt == 1
    assert_whole(store, run, 60)
    store.close()


@pytest.mark.slow
def test_kill_9_of_server_and_worker_goes_on_from_the_checkpoint(home: Home) -> None:
    store = Store.open(home)
    run = make_job(store, {"hold": {"1": [7]}, "steps": 30})
    store.close()
    server = serve(home)
    try:
        wait_for(lambda: last_step(run) == 7)
    finally:
        server.kill()
        server.wait()
    os.kill(pid_of(run), signal.SIGKILL)
    store = Store.open(home)
    boss = supervisor(store)
    until(boss, status_is(store, run, "succeeded", "failed"))
    assert get(store, run).status == "succeeded" and get(store, run).attempt == 2
    assert_whole(store, run, 30)
    store.close()


def test_a_worker_that_has_not_taken_its_lock_yet_is_not_started_twice(store: Store) -> None:
    run = make_job(store, {"late_lock": 0.5, "steps": 2})
    until(supervisor(store), status_is(store, run, "running"))
    first = pid_of(run)
    boss = supervisor(store)  # a new one, which did not start it
    until(boss, status_is(store, run, "succeeded"))
    assert pid_of(run) == first and run.attempts() == [0, 1]


def test_a_server_that_died_between_row_and_process_starts_the_job_without_counting_a_crash(store: Store) -> None:
    run = make_job(store, status="queued")
    store.update_job(run.id, {"queued"}, status="running", attempt=1)
    until(supervisor(store), status_is(store, run, "succeeded"))
    assert get(store, run).retry is None and run.attempts() == [0, 1]


def test_planned_shutdown_saves_and_the_next_server_goes_on(store: Store) -> None:
    run = make_job(store, {"hold": {"1": [3]}, "steps": 30})
    boss = supervisor(store)
    until(boss, at_step(store, run, 3))
    boss.stop_workers(20)
    assert not local.worker_alive(run)
    boss.tick()
    boss.tick()
    assert get(store, run).status == "queued" and not local.worker_alive(run)
    until(supervisor(store), status_is(store, run, "succeeded"))
    assert_whole(store, run, 30)


def test_foreground_runs_are_found_while_running_and_after(store: Store) -> None:
    running, boss = make_run(store.home, script={"hold": {"1": [2], "2": [9]}, "steps": 40}), supervisor(store)
    worker = FAKE.start(running, store.home)
    until(boss, at_step(store, running, 2))
    job = get(store, running)
    assert (job.status, job.started_by, job.model) == ("running", "foreground", "base-1b")
    worker.send_signal(signal.SIGTERM)  # Ctrl-C in the terminal
    worker.wait()
    until(boss, status_is(store, running, "paused"))
    worker = FAKE.start(running, store.home)  # tunewright train --resume
    until(boss, status_is(store, running, "running"))
    (running.folder / "go-9").touch()
    worker.wait()
    until(boss, status_is(store, running, "succeeded"))
    assert_whole(store, running, 40)
    assert store.find_model(job.name) is not None


def test_a_foreground_run_that_was_not_started_is_no_job(store: Store) -> None:
    make_run(store.home)
    boss = supervisor(store)
    boss.tick()
    assert store.job_ids() == set()


def test_rebuilt_from_the_run_folders_everything_is_the_same(store: Store) -> None:
    boss = supervisor(store)
    good = make_job(store, {"kill_at": {"1": 8}}, metadata={"a": "b"}, suffix="x", method={"type": "supervised"})
    bad = make_job(store, {"exit_at": {"1": [4, 72]}})
    cancelled = make_job(store)
    boss.cancel(cancelled.id)
    foreground = make_run(store.home)
    FAKE.start(foreground, store.home).wait()
    until(boss, status_is(store, good, "succeeded"))
    until(boss, status_is(store, bad, "failed"))
    until(boss, status_is(store, foreground, "succeeded"))
    paused = make_job(store, {"hold": {"1": [2]}})
    until(boss, at_step(store, paused, 2))
    boss.pause(paused.id)
    until(boss, status_is(store, paused, "paused"))
    before = dump(store)
    assert len(before["jobs"]) == 5 and len(before["models"]) == 4 and len(before["files"]) == 2
    store.rebuild()
    assert dump(store) == before
