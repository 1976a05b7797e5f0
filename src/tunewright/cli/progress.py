"""One job in the foreground: start the worker, show its events, turn Ctrl-C into a checkpoint and a way to go on.

The worker is its own process; all that is known of it comes from the events it writes.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from tunewright.core.errors import Busy
from tunewright.core.events import Event, read_events
from tunewright.core.home import Home, find_home
from tunewright.core.run import Run

POLL_S = 0.1
PLAIN_EVERY_S = 5.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_foreground(home: Home, run: Run, console: Console, whole: Run | None = None) -> Event:
    """Train `run` to its end and return the attempt's `end` event. whole: the chain that it is a stage of.

    A first Ctrl-C (or SIGTERM) lets the worker finish its step and save; a second one kills it. A worker that died
    without an end gives an event with status `killed`. Raises Busy when another process works on the run already.
    """
    if run.is_active():
        raise Busy(f"The job {run.id} is being trained by another process. `tunewright jobs` shows it.")
    from tunewright.jobs.launchers.local import start_worker

    attempt = max(run.attempts(), default=0) + 1
    with _stop_requests() as stops, _view(console) as view:
        worker = start_worker(run, home)
        end = _follow(worker, run, attempt, stops, view)
    end = end or _killed(worker, run, attempt)
    _closing_words(home, whole or run, end, console)
    return end


def resume_command(home: Home, run: Run) -> str:
    """The shell command that continues the run from its last checkpoint."""
    place = "" if home.root == find_home().root else f" --home {shlex.quote(str(home.root))}"
    return f"tunewright train --resume {run.id}{place}"


def seconds_text(seconds: float) -> str:
    """`42 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def bytes_text(n: float) -> str:
    """`512 MB` or `1.4 GB` (powers of ten)."""
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"


def plan_text(plan: dict[str, Any]) -> list[str]:
    """The plan as readable lines: what will be trained, how long it should take, how much memory it needs."""
    known = {k: v for k, v in plan.items() if v is not None}
    rows = [f"{known['n_rows']:,} rows"] if "n_rows" in known else []
    rows += [f"{known['n_tokens']:,} tokens an epoch"] if "n_tokens" in known else []
    rows += [f"{known[k]} {text}" for k, text in (("n_epochs", "epochs"), ("total_steps", "steps")) if k in known]
    rows += [f"{known['batch_size']} rows a step"] if "batch_size" in known else []
    rows += [f"learning rate {known['learning_rate']:g}"] if "learning_rate" in known else []
    lines = ["Plan: " + ", ".join(rows)]
    if "trainable_parameters" in known and "parameters" in known:
        share = 100 * known["trainable_parameters"] / known["parameters"]
        lines.append(f"Trains {known['trainable_parameters']:,} of {known['parameters']:,} parameters ({share:.2g} %)")
    base = known.get("base") or {}
    if base.get("loss") is not None:
        score = f", accuracy {base['mean_token_accuracy']:.1%}" if "mean_token_accuracy" in base else ""
        where = f"{base['rows']} {'training' if base['source'] == 'train' else 'validation'} rows"
        lines.append(f"Before training: loss {base['loss']:.4f}{score} ({where})")
    cost = [f"about {seconds_text(known['predicted_seconds'])}"] if "predicted_seconds" in known else []
    cost += (
        [time.strftime("until %H:%M:%S", time.localtime(known["predicted_finish"]))]
        if known.get("predicted_finish")
        else []
    )
    cost += [f"{bytes_text(known['peak_memory_bytes'])} of memory"] if "peak_memory_bytes" in known else []
    cost += [f"{known['dtype']}"] if "dtype" in known else []
    cost += [f"base in {known['quantization']}"] if known.get("quantization", "none") != "none" else []
    cost += [f"checkpointing {known['checkpointing']}"] if known.get("checkpointing", "none") != "none" else []
    cost += [f"{known['threads']} CPU threads"] if "threads" in known else []
    return [*lines, "Predicted: " + ", ".join(cost)] if cost else lines


def measured_text(end: dict[str, Any]) -> list[str]:
    """What the finished job took beside what was predicted, as one line, if both are known."""
    said = []
    for name, show in (("seconds", seconds_text), ("peak_memory_bytes", bytes_text)):
        measured, predicted = end.get(name), end.get(f"predicted_{name}")
        if measured and predicted:
            said.append(f"{show(measured)} (predicted {show(predicted)})")
    return ["Took " + ", ".join(said)] if said else []


class _PlainView:
    """A line every few seconds: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._last = 0.0

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.say(f"Warning: {text}")

    def phase(self, name: str, done: int, total: int) -> None:
        if self._due() or done == total:
            self.say(f"{name}: {done}/{total}" if total else name)

    def metrics(self, data: dict[str, Any]) -> None:
        if self._due() or data["step"] in (1, data["total_steps"]):
            self.say(f"step {data['step']}/{data['total_steps']}  {_figures(data)}")

    def _due(self) -> bool:
        now = time.monotonic()
        due = now - self._last >= PLAIN_EVERY_S
        self._last = now if due else self._last
        return due


class _BarView:
    """A progress bar, for a terminal."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self.console, self.progress = console, progress
        self._tasks: dict[str, TaskID] = {}

    def say(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False)

    def warn(self, text: str) -> None:
        self.progress.console.print(f"[yellow]Warning:[/] {escape(text)}", highlight=False)

    def phase(self, name: str, done: int, total: int) -> None:
        self._update(name, done, total, "")

    def metrics(self, data: dict[str, Any]) -> None:
        for name in [n for n in self._tasks if n != "training"]:
            self.progress.remove_task(self._tasks.pop(name))
        self._update("training", data["step"], data["total_steps"], _figures(data))

    def _update(self, name: str, done: int, total: int, figures: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self.progress.add_task(name, total=total or None, figures="")
        self.progress.update(self._tasks[name], completed=done, total=total or None, figures=figures)


def _figures(data: dict[str, Any]) -> str:
    parts = [f"loss {data['train_loss']:.4f}"] if data.get("train_loss") is not None else ["loss is not a number"]
    parts += [f"valid {data['valid_loss']:.4f}"] if data.get("valid_loss") is not None else []
    parts += [f"margin {data['train_reward_margin']:.3f}"] if data.get("train_reward_margin") is not None else []
    parts += [f"{data['tokens_per_second']:,.0f} tokens/s"] if data.get("tokens_per_second") else []
    parts += [f"{seconds_text(data['eta_s'])} left"] if data.get("eta_s") is not None else []
    return "  ".join(parts)


def _view(console: Console) -> AbstractContextManager[_PlainView | _BarView]:
    return _bar_view(console) if console.is_terminal else nullcontext(_PlainView(console))


@contextmanager
def _bar_view(console: Console) -> Iterator[_BarView]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield _BarView(console, progress)


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """The signals that asked to stop, in order. The old handlers come back at the end."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    old = {s: signal.signal(s, note) for s in STOP_SIGNALS}
    try:
        yield asked
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def _follow(
    worker: subprocess.Popen[Any], run: Run, attempt: int, stops: list[int], view: _PlainView | _BarView
) -> Event | None:
    """Show the events of one attempt until its worker is gone. Returns the `end` event if there is one."""
    path, offset, seen_stops = run.attempt(attempt) / "events.jsonl", 0, 0
    while True:
        gone = worker.poll() is not None  # asked before reading, so that the last lines are not missed
        if len(stops) > seen_stops:
            seen_stops = _pass_on(worker, len(stops), view)
        events, offset = read_events(path, attempt, offset)
        for event in events:
            _show(event, view)
        if events and events[-1].type == "end":
            worker.wait()
            return events[-1]
        if gone:
            return None
        time.sleep(POLL_S)


def _pass_on(worker: subprocess.Popen[Any], n: int, view: _PlainView | _BarView) -> int:
    """The first request to stop asks the worker to save; later ones kill its process group. Returns n."""
    if worker.poll() is not None:
        return n
    if n == 1:
        worker.terminate()
        view.say("Stopping after this step and saving a checkpoint. Ctrl-C once more stops at once.")
    else:
        os.killpg(worker.pid, signal.SIGKILL)
        view.say("Stopping at once.")
    return n


def _show(event: Event, view: _PlainView | _BarView) -> None:
    if event.type == "metrics":
        view.metrics(event.data)
    elif event.type == "phase":
        view.phase(str(event.data.get("name", "")), int(event.data.get("done", 0)), int(event.data.get("total", 0)))
    elif event.type == "plan":
        for line in plan_text(event.data):
            view.say(line)
    elif event.level != "info" and event.type != "end":
        view.warn(event.message)
    elif event.type == "resumed":
        view.say(event.message or f"Continuing after step {event.data['step']}.")


def _killed(worker: subprocess.Popen[Any], run: Run, attempt: int) -> Event:
    """What we say of a worker that left no `end` event."""
    code = worker.wait()
    if code < 0:
        name = signal.Signals(-code).name
        why = f"was killed by {name}" + (" (often: the system ran out of memory)" if name == "SIGKILL" else "")
    else:
        log = run.folder / "worker.log"
        last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.is_file() else []
        why = f"stopped with exit code {code}" + (f": {last[0]}" if last else "")
    data = {"status": "killed", "code": "worker_died", "exit_code": code}
    return Event(0, time.time(), "end", "error", f"The worker {why}.", data, attempt)


def _closing_words(home: Home, run: Run, end: Event, console: Console) -> None:
    """Why it ended, if not well, and how to go on."""
    status = end.data.get("status")
    if status == "succeeded":
        return
    message = end.data.get("message") or end.message
    text = f"The job failed: {message}" if status == "failed" else message
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if status != "failed":
        console.print(f"To continue:  {resume_command(home, run)}", markup=False, highlight=False, soft_wrap=True)
