"""The supervisor with the real worker and the tiny model: killed, paused or left alone, the numbers are the same."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs_kit import at_step, dump, get, messages, row_of, status_is, until

from tunewright.core.durable import read_json
from tunewright.core.home import Home
from tunewright.core.run import Run
from tunewright.core.spec import check_parts, parse_spec
from tunewright.jobs.describe import load_describe
from tunewright.jobs.launchers import local
from tunewright.jobs.prepare import create_run
from tunewright.jobs.store import Store
from tunewright.jobs.supervisor import Supervisor

pytestmark = pytest.mark.slow


@pytest.fixture
def store(tiny_home: Home, described: Path) -> Iterator[Store]:
    shutil.copy(described, tiny_home.cache)
    opened = Store.open(tiny_home)
    yield opened
    for run in (opened.run(job_id) for job_id in opened.job_ids()):
        local.signal_group(run, signal.SIGKILL)
    opened.close()


def add(store: Store, data: Path, **fields: Any) -> Run:
    raw = {
        "model": "tiny",
        "training_file": "file-train",
        "n_epochs": 2,
        "batch_size": 1,
        "seed": 3,
        "threads": 1,
        "dtype": "float32",
        "save_every_steps": 4,
        **fields,
    }
    spec = check_parts(parse_spec(raw), load_describe(store.home))
    validation = data if fields.get("validation_file") else None
    run = create_run(store.home, spec, train_path=data, validation_path=validation)
    store.add_job(row_of(run, validation_file=fields.get("validation_file")))
    return run


def losses(store: Store, run: Run) -> list[tuple[int, float]]:
    return [(p["step"], p["train_loss"]) for p in store.metric_points(run.id)]


def weights(run: Run) -> str:
    files = read_json(run.result / "MANIFEST.json")["files"]
    return next(f["sha256"] for f in files if f["name"].endswith(".safetensors"))


@pytest.mark.nightly
def test_killed_and_paused_gives_the_same_as_left_alone(
    store: Store, tmp_path: Path, sft_file: Callable[..., Path]
) -> None:
    data = sft_file(tmp_path, 40)
    boss = Supervisor(store, store.home, backoff=(0.0,))
    alone, disturbed = add(store, data, n_epochs=4), add(store, data, n_epochs=4)
    until(boss, status_is(store, alone, "succeeded", "failed"), 120)
    assert get(store, alone).error is None

    until(boss, at_step(store, disturbed, 7), 120)
    os.kill(int((local._started(disturbed) or {})["pid"]), signal.SIGKILL)
    until(boss, lambda: get(store, disturbed).attempt == 2 and at_step(store, disturbed, 20)(), 120)
    boss.pause(disturbed.id)
    until(boss, status_is(store, disturbed, "paused", "succeeded"), 30)
    assert get(store, disturbed).status == "paused"
    boss.resume(disturbed.id)
    until(boss, status_is(store, disturbed, "succeeded", "failed"), 120)

    job = get(store, disturbed)
    assert (job.status, job.attempt) == ("succeeded", 3)
    assert losses(store, disturbed) == losses(store, alone)
    assert [s for s, _ in losses(store, alone)] == list(range(1, 161))
    assert weights(disturbed) == weights(alone)
    assert job.trained_tokens == get(store, alone).trained_tokens
    assert (job.resolved or {})["n_epochs"] == 4
    [result] = job.result_files
    row = store.get_file(result)
    assert row is not None
    lines = store.home.blob(row.sha256).read_text().splitlines()
    assert lines[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy" and len(lines) == 161
    saved = [c.name for c in store.list_checkpoints(disturbed.id).data]
    assert saved == [job.name, f"{job.name}:ckpt-step-120", f"{job.name}:ckpt-step-80"]
    before = dump(store)
    store.rebuild()
    assert dump(store) == before


def test_a_job_continues_from_a_finished_one(store: Store, tmp_path: Path, sft_file: Callable[..., Path]) -> None:
    data = sft_file(tmp_path, 12)
    boss = Supervisor(store, store.home)
    first = add(store, data, n_epochs=1, validation_file="file-valid")
    until(boss, status_is(store, first, "succeeded", "failed"), 120)
    assert "Validating training file: file-train and validation file: file-valid" in messages(store, first)
    second = add(store, data, n_epochs=1, model=get(store, first).name)
    until(boss, status_is(store, second, "succeeded", "failed"), 120)
    assert get(store, second).error is None
    assert get(store, second).base == "tiny"


def test_too_few_rows_fail_in_validation(store: Store, tmp_path: Path, sft_file: Callable[..., Path]) -> None:
    run = add(store, sft_file(tmp_path, 3))
    until(Supervisor(store, store.home), status_is(store, run, "failed"), 30)
    error = get(store, run).error or {}
    assert error["code"] == "invalid_n_examples" and error["param"] == "training_file"
    assert "3 example(s), but must have at least 10 examples" in error["message"]
    assert run.attempts() == [0]
