"""What the tests of jobs share: a base model that only has a name, jobs for the fake worker, a supervisor to tick."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from tunewright.core.home import Home
from tunewright.core.ids import new_id
from tunewright.core.run import Run
from tunewright.core.spec import parse_spec
from tunewright.jobs.launchers import Launcher
from tunewright.jobs.launchers.local import LAUNCHER, start_worker
from tunewright.jobs.prepare import create_run
from tunewright.jobs.rows import JobRow
from tunewright.jobs.store import Store
from tunewright.jobs.supervisor import Supervisor

FAKE_WORKER = Path(__file__).with_name("jobs_fake_worker.py")
FAKE = Launcher(
    partial(start_worker, command=(sys.executable, "-S", str(FAKE_WORKER))),
    LAUNCHER.leader_alive,
    LAUNCHER.alive,
    LAUNCHER.signal,
)


@cache
def _empty_database() -> bytes:
    """A migrated database, made once: migrating takes longer than most tests."""
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder)).ensure()
        Store.open(home).close()
        return home.database.read_bytes()


def open_store(home: Home) -> Store:
    home.ensure().database.write_bytes(_empty_database())
    return Store.open(home)


def add_base(home: Home, name: str = "base-1b") -> str:
    folder = home.models / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    return name


def make_run(home: Home, model: str = "base-1b", script: dict[str, Any] | None = None, **spec: Any) -> Run:
    """A run folder for the fake worker."""
    add_base(home)
    data = home.root / "train.jsonl"
    data.write_text('{"messages": []}\n')
    raw = {"model": model, "training_file": "file-train", "seed": 7, **spec}
    run = create_run(home, parse_spec(raw), job_id=new_id("ftjob-"), train_path=data)
    (run.folder / "script.json").write_text(json.dumps({"steps": 20, **(script or {})}))
    return run


def row_of(run: Run, **fields: Any) -> JobRow:
    job = run.job()
    known: dict[str, Any] = {
        "id": run.id,
        "created_at": int(job.created_at),
        "model": job.spec.model,
        "base": job.base,
        "name": job.name,
        "training_file": "file-train",
        "spec": job.spec.model_dump(mode="json"),
        "hyperparameters": {"n_epochs": "auto"},
        "seed": job.spec.seed,
    }
    return JobRow(**{**known, **fields})


def make_job(store: Store, script: dict[str, Any] | None = None, **fields: Any) -> Run:
    """A job as the API makes it."""
    run = make_run(store.home, script=script)
    store.add_job(row_of(run, **fields))
    return run


def supervisor(store: Store, launcher: Launcher = FAKE, **options: Any) -> Supervisor:
    """One that retries without waiting and does not look at data."""
    return Supervisor(store, store.home, launcher, **{"check": lambda *_: None, "backoff": (0.0,), **options})


def until(boss: Supervisor, done: Callable[[], Any], seconds: float = 60.0) -> None:
    """Tick until `done()`."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, [(j.id, j.status, j.error) for j in boss.store.list_jobs().data]
        boss.tick()
        time.sleep(0.01)


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    """Wait until `condition()`, without a supervisor."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def status_is(store: Store, run: Run, *statuses: str) -> Callable[[], bool]:
    def reached() -> bool:
        job = store.get_job(run.id)
        return job is not None and job.status in statuses

    return reached


def get(store: Store, run: Run) -> JobRow:
    job = store.get_job(run.id)
    assert job is not None
    return job


def at_step(store: Store, run: Run, step: int) -> Callable[[], bool]:
    return lambda: any(p["step"] >= step for p in store.metric_points(run.id))


def messages(store: Store, run: Run) -> list[str]:
    """All the job's messages, oldest first."""
    return [e.message for e in store.list_events(run.id, limit=10_000).data][::-1]


def dump(store: Store) -> dict[str, Any]:
    """Everything the index says of jobs, files and models."""
    jobs = store.list_jobs(limit=10_000).data
    return {
        "jobs": jobs,
        "files": store.list_files().data,
        "events": [store.list_events(j.id, limit=10_000).data for j in jobs],
        "points": [store.metric_points(j.id) for j in jobs],
        "checkpoints": [store.list_checkpoints(j.id, limit=100).data for j in jobs],
        "models": store.list_models(),
    }
