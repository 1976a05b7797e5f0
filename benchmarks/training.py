"""How fast training is on this machine, and how well the prediction fits: one epoch of the demo's rows, real model.

`make bench`, or `python benchmarks/training.py --set tuner=full --json FILE`. Prints one JSON object. Close other
programs first; times of a busy machine say nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from tunewright.cli.commands.train import new_run, read_spec
from tunewright.cli.progress import run_foreground
from tunewright.core.home import Home
from tunewright.core.run import Run
from tunewright.data.demo import TRAIN

SETTINGS = ("model=smollm2-135m-instruct", f"training_file={TRAIN}", "n_epochs=1", "batch_size=8", "seed=1")


def measure(overrides: list[str]) -> dict[str, Any]:
    """Train in a temporary data folder; the settings, the machine and the figures."""
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder)).ensure()
        run = new_run(home, read_spec(None, [*SETTINGS, *overrides]), console)
        end = run_foreground(home, run, console)
        if end.data.get("status") != "succeeded":
            raise SystemExit(1)
        return {"settings": [*SETTINGS[2:], *overrides], "machine": machine(), **figures(run, end.data)}


def figures(run: Run, end: dict[str, Any]) -> dict[str, Any]:
    """tokens_per_second: over the whole loop, saving included. seconds, peak bytes: measured beside predicted."""
    steps = [e for e in run.events() if e.type == "metrics"]
    gaps = [b.time - a.time for a, b in itertools.pairwise(steps)]
    plan = run.plan() or {}
    names = ("seconds", "predicted_seconds", "peak_memory_bytes", "predicted_peak_memory_bytes")
    return {
        "tokens_per_second": plan["n_tokens"] * plan["n_epochs"] / end["seconds"],
        "median_seconds_per_step": statistics.median(gaps),
        **{name: end[name] for name in names},
        **{name: plan[name] for name in ("dtype", "threads", "n_tokens", "total_steps", "versions")},
    }


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return {"cpu": name, "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a field of the job")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args()
    text = json.dumps(measure(args.set), indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
