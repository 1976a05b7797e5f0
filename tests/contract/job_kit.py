"""Whole jobs in this process, as the worker runs them, and what an engine says with their results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tunewright.core.durable import sha256_file
from tunewright.core.events import EventWriter
from tunewright.core.home import Home
from tunewright.core.run import Run
from tunewright.core.spec import JobSpec, check_parts, parse_spec
from tunewright.engine.engine import Engine
from tunewright.engine.request import parse_request
from tunewright.train.describe import describe
from tunewright.train.run import run_job


def checked(fields: dict[str, Any]) -> JobSpec:
    """The spec, as every surface checks it."""
    return check_parts(parse_spec(fields), describe())


def attempt(run: Run, home: Home, number: int = 1, stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    events = EventWriter(run.attempt(number) / "events.jsonl", number)
    try:
        return run_job(run, home, events, stop)
    finally:
        events.close()


def weights(run: Run) -> dict[str, str]:
    return {p.name: sha256_file(p) for p in run.result.glob("*.safetensors")}


def stop_after(n: int) -> Callable[[], bool]:
    """True from the n-th time that it is asked."""
    asked = iter(range(n - 1))
    return lambda: next(asked, None) is None


def greedy(home: Home, run: Run, prompt: list[int], n: int) -> list[int]:
    """The tokens that the engine says after `prompt` with the job's result."""
    engine, log = Engine(home, dtype="float32", threads=1), []
    asked = {"artefact": str(run.result), "prompt": prompt, "max_tokens": n, "temperature": 0.0}
    engine.add_request(parse_request(asked), log.append)
    while engine.step():
        pass
    return [e["token_id"] for e in log if e["type"] == "token"]
