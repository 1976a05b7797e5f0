"""Runs jobs of the tiny model in tests/e2e/fault_worker.py and reads what must not differ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny
from tunewright.core.durable import sha256_file
from tunewright.core.home import Home
from tunewright.core.run import Run
from tunewright.core.spec import parse_spec
from tunewright.jobs.prepare import create_run

SPEC: dict[str, Any] = {
    "model": "tiny",
    "training_file": "train.jsonl",
    "validation_file": "valid.jsonl",
    "n_epochs": 3,
    "batch_size": 4,
    "micro_batch_tokens": 256,
    "eval_every": 2,
    "save_every_steps": 2,
    "seed": 7,
    "dtype": "float32",
    "threads": 1,
}
STEPS = 18


class Machine:
    """A data folder with the tiny model, and a process that runs workers in it, with faults."""

    def __init__(self, root: Path, model: Path) -> None:
        self.home = Home(root).ensure()
        tiny.install_tiny_model(root, "tiny", built=model)
        self.train = tiny.write_rows(root / "train.jsonl", tiny.sft_rows(24))
        self.valid = tiny.write_rows(root / "valid.jsonl", tiny.sft_rows(6))
        self.output = root / "worker-output.txt"
        self._log = open(self.output, "ab")  # noqa: SIM115 closed in close()
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "fault_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "TUNEWRIGHT_HOME": str(root), "OMP_NUM_THREADS": "1"},
        )

    def close(self) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)
        self._server.stdout.close()
        self._log.close()

    def new_run(self, **changes: Any) -> Run:
        return create_run(self.home, parse_spec({**SPEC, **changes}), train_path=self.train, validation_path=self.valid)

    def attempt(self, run: Run, **faults: Any) -> int:
        """One attempt of the worker; returns its exit code, negative for a signal."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps({"run": str(run.folder), **faults}) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def finish(self, run: Run, **faults: Any) -> None:
        """Run to the end; a failure shows the worker's output."""
        assert self.attempt(run, **faults) == 0, self.output.read_text()[-3000:]

    def counts(self) -> dict[str, int]:
        """How often the last attempt that ended by itself came by each place where a kill can be asked for."""
        return json.loads((self.home.runs / "counts.json").read_text())


def story(run: Run) -> tuple[list[tuple[Any, ...]], str, list[int]]:
    """What must not differ: each step's numbers, the hash of the weights, the callable checkpoints."""
    events = run.events()
    assert events == list(run.stream())
    keys = ("step", "train_loss", "train_mean_token_accuracy", "grad_norm", "lr", "valid_loss", "full_valid_loss")
    steps = [tuple(e.data.get(k) for k in keys) for e in events if e.type == "metrics"]
    epochs = [e.data["step"] for e in events if e.type == "checkpoint" and e.data["kind"] == "epoch"]
    (weights,) = run.result.glob("*.safetensors")
    return steps, sha256_file(weights), epochs


def warnings(run: Run) -> list[str]:
    return [e.message for e in run.events() if e.level == "warn"]
