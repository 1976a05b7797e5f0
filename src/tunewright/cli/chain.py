"""A chain in the foreground: one stage's job after the other, each as `tunewright train` runs any job.

The chain's own attempts/N/events.jsonl says which stage began when and how it ended; how far the chain is follows from
its stages' run folders alone, so `--resume` goes on wherever the last command, or a server, left off.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from tunewright.cli.commands.jobs import status_of
from tunewright.cli.commands.train import check_all_data
from tunewright.cli.progress import resume_command, run_foreground
from tunewright.core.chain import check_stages, files_of, in_stage, parse_chain
from tunewright.core.durable import Lock, is_locked
from tunewright.core.errors import Busy, StateError, TunewrightError, UserError
from tunewright.core.events import Event, EventWriter
from tunewright.core.home import Home
from tunewright.core.run import Run
from tunewright.jobs import journal
from tunewright.jobs.chain import (
    Child,
    Next,
    attempts_of,
    check_names,
    child_id,
    create_chain,
    create_stage,
    next_stage,
)
from tunewright.jobs.describe import load_describe
from tunewright.jobs.rows import WITH_WORKER

ENDED = ("succeeded", "failed", "cancelled")


def new_chain(home: Home, raw: Any, console: Console) -> Run:
    """Check every stage's spec and data, then write the chain's run folder. Raises UserError; then nothing was made."""
    stages = parse_chain(raw)
    check_names(home, stages)
    described = load_describe(home)
    stages = check_stages(stages, described)
    for name, spec in stages.items():
        try:
            check_all_data(spec, console, described)
        except UserError as e:
            raise in_stage(name, e) from e
    paths = {f"{name}/{role}": Path(p) for name, spec in stages.items() for role, p in files_of(spec).items()}
    return create_chain(home, stages, paths=paths)


def look(home: Home, chain: Run) -> Next:
    """What follows for the chain, by the run folders of its stages. A job that was only stopped waits to go on."""
    stages = chain.job().stages
    made = {}
    for stage in stages:
        n = _jobs_of(home, chain, stage)
        if n:
            run = Run(home.runs / child_id(chain.id, stage, n))
            status = status_of(run)
            made[stage] = Child(run.id, status if status in ENDED else "paused", run.job().name)
    return next_stage(stages, made)


def _jobs_of(home: Home, chain: Run, stage: str) -> int:
    return attempts_of(chain.id, stage, lambda job_id: (home.runs / job_id / "job.json").is_file())


def train_chain(home: Home, chain: Run, console: Console) -> tuple[Run, Event]:
    """Train what is left of the chain. Returns the last job that ran and its `end` event.

    A stage that failed before is done again, once. Raises StateError if nothing is left, Busy if another process works
    on the chain.
    """
    if _is_driven(home, chain):
        raise Busy(f"The chain {chain.id} is under way in the server of {home.root}; watch, pause or cancel it there.")
    with Lock(chain.lock, "tunewright train"):
        todo = look(home, chain)
        if todo.what == "done" and todo.child is not None:
            raise StateError(f"The chain {chain.id} has finished; its model is {todo.child.model}.")
        number = max([0, *chain.attempts()]) + 1
        events = EventWriter(chain.attempt(number) / "events.jsonl", number)
        try:
            while True:
                run = create_stage(home, chain, todo, _attempt(home, chain, todo))
                end = _train_stage(home, chain, run, todo, events, console)
                todo = look(home, chain)
                if todo.what in ("done", "failed", "wait"):
                    events.write("end", end.message, {"status": end.data.get("status"), "stage": todo.stage})
                    return run, end
        except TunewrightError as e:
            events.write("end", e.message, {"status": "failed", "code": e.code, "stage": todo.stage}, "error")
            raise
        finally:
            events.close()


def _is_driven(home: Home, chain: Run) -> bool:
    """Whether a living server makes the chain's jobs."""
    known: dict[str, Any] = {}
    for event in journal.read(chain)[0]:
        known |= journal.changes_of(event) or {}
    active = known.get("status") in ("validating_files", "queued", *WITH_WORKER)
    return active and known["started_by"] == "api" and is_locked(home.root / "server.lock")


def _attempt(home: Home, chain: Run, todo: Next) -> int:
    """The number of the job to run for the stage: the one there is, or a new one if that failed."""
    return max(1, _jobs_of(home, chain, todo.stage) + (todo.what == "failed"))


def _train_stage(home: Home, chain: Run, run: Run, todo: Next, events: EventWriter, console: Console) -> Event:
    title = f"Stage {todo.number} of {len(chain.job().stages)}, '{todo.stage}',"
    begun = "goes on" if todo.what == "wait" else "has begun"
    events.write("message", f"{title} {begun}: {run.id}", {"stage": todo.stage})
    console.print(f"{title} is the job {run.id}", markup=False, highlight=False, soft_wrap=True)
    end = run_foreground(home, run, console, whole=chain)
    status = end.data.get("status")
    level = "info" if status in ("succeeded", "interrupted") else "error"
    text = f"{title} has ended: {status}." + ("" if status == "succeeded" else f" {end.message}")
    events.write("message", text, {"stage": todo.stage}, level)
    if status == "succeeded":
        console.print(f"Its model is {run.job().name}", markup=False, highlight=False, soft_wrap=True)
    elif status == "failed":
        kept = " The stages before it are kept." if todo.number > 1 else ""
        words = f"Stage '{todo.stage}' failed.{kept} To do it again:  {resume_command(home, chain)}"
        console.print(words, markup=False, highlight=False, soft_wrap=True)
    return end
