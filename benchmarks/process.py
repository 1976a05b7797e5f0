"""Runs one rival, or our own worker, in its own process, and watches its memory from outside."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.rivals.shared import Task, enough
from benchmarks.table import Rival
from benchmarks.venv import trl_python
from tunewright.core.events import Event, read_events
from tunewright.core.home import Home
from tunewright.core.run import Run
from tunewright.core.spec import check_parts, extra_files, parse_spec
from tunewright.jobs.describe import load_describe
from tunewright.jobs.launchers.local import start_worker, stop
from tunewright.jobs.prepare import create_run
from tunewright.train.plan import order

POLL_S = 0.25
GPU_POLL_S = 2.0
PROGRAMS = Path(__file__).parent / "rivals"


class RivalFailed(Exception):
    """A process did not do what it was started for; the text ends with its last output."""


@dataclass(frozen=True)
class Step:
    """One optimizer step. time: when it ended, Unix seconds. tokens, supervised: of this step, without padding."""

    number: int
    time: float
    tokens: int
    supervised: int
    loss: float | None = None
    grad_norm: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    started: when the process was started; began: when its first step did; ended: when the process was gone.
    peak_bytes: VmHWM of the process. tree_bytes: resident memory of it and its children together, sampled.
    gpu_bytes: memory the process held on the GPU. facts: done.json, or our plan and end event. trained: the weights.
    """

    started: float
    began: float
    ended: float
    steps: list[Step]
    peak_bytes: int
    tree_bytes: int
    gpu_bytes: int
    facts: dict[str, Any]
    trained: Path


@dataclass
class Watch:
    """Memory of a process and its children, sampled while it lives."""

    pid: int
    peak: int = 0
    tree: int = 0
    gpu: int = 0
    _gpu_at: float = field(default=0.0, repr=False)

    def look(self) -> None:
        try:
            self.peak = max(self.peak, high_water_mark(self.pid))
            me = psutil.Process(self.pid)
            family = [me, *me.children(recursive=True)]
            self.tree = max(self.tree, sum(p.memory_info().rss for p in family))
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            return  # it ended between two looks
        if time.monotonic() - self._gpu_at > GPU_POLL_S and shutil.which("nvidia-smi"):
            self._gpu_at = time.monotonic()
            self.gpu = max(self.gpu, gpu_bytes({p.pid for p in family}))


def high_water_mark(pid: int) -> int:
    """VmHWM of a process in bytes: the most memory it ever held. 0 once it is a zombie."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def gpu_bytes(pids: set[int]) -> int:
    """Bytes that these processes hold on the GPUs, as nvidia-smi says."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    held = [line.split(",") for line in lines if line.strip()]
    return sum(int(used) << 20 for pid, used in held if int(pid) in pids)


def run_rival(rival: Rival, task: Task, limit_s: float) -> Outcome:
    """Run a program of rivals/ to its end. Raises RivalFailed."""
    assert rival.program is not None
    out = Path(task.out)
    out.mkdir(parents=True)
    with open(task.data, "rb") as lines:
        task = replace(task, order=epoch_order(sum(1 for _ in lines), task.seed))
    (out / "task.json").write_text(json.dumps(asdict(task)))
    command = [trl_python() if rival.trl else sys.executable, str(PROGRAMS / rival.program), str(out / "task.json")]
    env = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "LD_PRELOAD", "PYTHONPATH")}
    env |= {"OMP_NUM_THREADS": str(task.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **rival.env}
    with open(out / "log.txt", "wb") as log:
        started = time.time()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
        )
        watch = Watch(process.pid)
        try:
            follow(process, watch.look, limit_s)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    ended = time.time()
    if process.returncode != 0 or not (out / "done.json").exists():
        tail = "\n".join((out / "log.txt").read_text(errors="replace").splitlines()[-15:])
        raise RivalFailed(f"{rival.program} ended with {process.returncode} after {ended - started:.0f} s:\n{tail}")
    facts = json.loads((out / "done.json").read_text())
    began, steps = read_steps(out / "steps.jsonl") if (out / "steps.jsonl").exists() else (started, [])
    gpu = max(watch.gpu, facts.get("gpu_peak_bytes", 0))
    return Outcome(started, began, ended, steps, watch.peak, watch.tree, gpu, facts, out / "trained")


def epoch_order(n: int, seed: int) -> list[int]:
    """The numbers of n rows in the order of our first epoch."""
    return [int(i) for i in order(seed, 0, n)]


def follow(process: subprocess.Popen[bytes], look: Callable[[], None], limit_s: float) -> None:
    """Look every quarter of a second until the process is gone or the limit is reached."""
    until = time.monotonic() + limit_s
    while process.poll() is None and time.monotonic() < until:
        look()
        time.sleep(POLL_S)


def read_steps(path: Path) -> tuple[float, list[Step]]:
    """(when step 1 began, the steps) of a rival's steps.jsonl, later records about a step merged into it."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    steps: dict[int, dict[str, Any]] = {}
    for record in records:
        if "step" in record:
            steps.setdefault(record["step"], {}).update(record)
    began = next((r["began"] for r in records if "began" in r), 0.0)
    known = [s for s in steps.values() if "time" in s]
    return began, [
        Step(s["step"], s["time"], s["tokens"], s["supervised"], s.get("loss"), s.get("grad_norm")) for s in known
    ]


def job_spec(task: Task, model: str) -> dict[str, Any]:
    """The task as a job spec. `options` may replace any field."""
    lora = {"name": "lora", "r": task.r, "alpha": task.alpha}
    return {
        "model": model,
        "training_file": task.data,
        "tuner": lora if task.tuner == "lora" else task.tuner,
        "schedule": {"name": "constant", "warmup": 0},
        "batch_size": task.batch,
        "learning_rate": task.lr,
        "n_epochs": task.epochs,
        "seed": task.seed,
        "dtype": task.dtype,
        "threads": task.threads,
        "min_examples": 1,
        **task.options,
    }


def run_ours(task: Task, model: str, home: Home, limit_s: float) -> Outcome:
    """Run a job through the real worker: job spec -> run folder -> events. Stopped by SIGTERM when it is enough.

    model: a name in home or a folder. A task with `steps` runs to its end. Raises RivalFailed.
    """
    spec = check_parts(parse_spec(job_spec(task, model)), load_describe(home))
    more = {role: Path(file) for role, file in extra_files(spec).items()}
    run = create_run(home, spec, job_id=f"ftjob-{Path(task.out).name}", train_path=Path(task.data), more=more)
    started = time.time()
    process = start_worker(run, home)
    watch, events = Watch(process.pid), Events(run)

    def look() -> None:
        watch.look()
        events.read()
        if task.steps is None and enough([s.time for s in events.steps], task) and process.poll() is None:
            process.terminate()

    try:
        follow(process, look, limit_s)
    finally:
        if process.poll() is None:
            stop(run, timeout=1.0)
            process.wait()
    ended = time.time()
    events.read()
    if events.end is None or events.end.data.get("status") not in ("succeeded", "interrupted"):
        said = events.end.message if events.end else "(no end event)"
        tail = "\n".join((run.folder / "worker.log").read_text(errors="replace").splitlines()[-15:])
        raise RivalFailed(f"our worker ended with {process.returncode}: {said}\n{tail}")
    plan = run.plan() or {}
    facts = {"plan": plan, "end": events.end.data, "versions": plan.get("versions", {}), "run": str(run.folder)}
    began = events.planned or started
    return Outcome(started, began, ended, events.steps, watch.peak, watch.tree, watch.gpu, facts, run.result)


@dataclass
class Events:
    """Our run's events as steps, read as they come. planned: when the plan was ready, so when step 1 could begin."""

    run: Run
    steps: list[Step] = field(default_factory=list)
    planned: float | None = None
    end: Event | None = None
    _offset: int = 0
    _before: tuple[int, int] = (0, 0)

    def read(self) -> None:
        found, self._offset = read_events(self.run.attempt(1) / "events.jsonl", 1, self._offset)
        for event in found:
            if event.type == "plan":
                self.planned = event.time
            elif event.type == "metrics":
                self.steps.append(self._step(event))
            elif event.type == "end":
                self.end = event

    def _step(self, event: Event) -> Step:
        """Counts in events are sums since the start."""
        d = event.data
        now = (d["trained_tokens"], d["supervised_tokens"])
        tokens, supervised = (b - a for a, b in zip(self._before, now, strict=True))
        self._before = now
        return Step(d["step"], event.time, tokens, supervised, d["train_loss"], d["grad_norm"])


def run_one(rival: Rival, task: Task, model: str, home: Home, limit_s: float = 3600.0) -> Outcome:
    """Run a rival of the table."""
    if rival.program is None:
        return run_ours(task, model, home, limit_s)
    return run_rival(rival, task, limit_s)


def temporary_home(real: Home, folder: Path) -> Home:
    """A data folder for the measured jobs that shares the models and the caches of the real one."""
    folder.mkdir(parents=True)
    for name in ("models", "cache"):
        (folder / name).symlink_to(getattr(real, name), target_is_directory=True)
    return Home(folder).ensure()
