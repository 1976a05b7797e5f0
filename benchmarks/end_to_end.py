"""Everything counts: from the start of the command to the finished model, for a job that takes us two minutes.

    python -m benchmarks.end_to_end --data benchmarks/data/mixed.jsonl --json end_to_end.json

Ours is `tunewright train` as a user types it: start-up, checking and reading the rows, preflight, compiling, training,
saving and verifying the result. The rivals train exactly as many steps on the same rows and save their adapter. A rival
that has not finished after --limit minutes is stopped, and its time is start-up plus all steps at its own median; the
result says so.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import yaml

from benchmarks.figures import figures, machine
from benchmarks.process import job_spec, run_one
from benchmarks.rivals.shared import Task
from benchmarks.settings import Settings, prepared, save, say, sft_parser, stop_like_ctrl_c
from benchmarks.table import RIVALS, options_for

CALIBRATION_S = 20.0


def steps_for(s: Settings, seconds: float) -> int:
    """So many steps take us about `seconds`, from a short run."""
    outcome = run_one(RIVALS["ours"], s.task("calibrate", s.train, seconds=CALIBRATION_S), s.model, s.home)
    got = figures(outcome, 1)
    return max(2, round(max(seconds - got["startup_s"], seconds / 2) / got["median_step_s"]))


def sized(s: Settings, steps: int) -> tuple[Task, int]:
    """(a task of about that many steps in whole epochs, its steps): epochs over the file, or over its first rows."""
    rows = s.train.read_text(encoding="utf-8").splitlines()
    per_epoch = len(rows) // s.batch
    epochs = max(1, min(50, round(steps / per_epoch)))
    kept = min(per_epoch, steps) if epochs == 1 else per_epoch
    data = s.work / "job.jsonl"
    data.write_text("\n".join(rows[: kept * s.batch]) + "\n", encoding="utf-8")
    return s.task("job", data, epochs=epochs, steps=kept * epochs, save=True), kept * epochs


def ours(s: Settings, task: Task) -> dict[str, Any]:
    """`tunewright train`, from its start to its end."""
    spec = {**job_spec(replace(task, options={}), s.model), "suffix": "bench"}
    path = s.work / "job.yaml"
    path.write_text(yaml.safe_dump(spec))
    command = [sys.executable, "-m", "tunewright.cli.main", "train", str(path), "--home", str(s.home.root)]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    seconds = time.monotonic() - started
    if done.returncode != 0:
        raise SystemExit(f"tunewright train ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return {"rival": "ours", "seconds": seconds, "extrapolated": False}


def theirs(s: Settings, name: str, task: Task, limit_s: float) -> dict[str, Any]:
    """A rival's process, from its start to its end or to the limit."""
    steps = task.steps or 0
    slow = replace(task, out=str(s.work / f"job-{name}"), options=options_for(RIVALS[name], s.tuner), limit_s=limit_s)
    outcome = run_one(RIVALS[name], slow, s.model, s.home, limit_s=2 * limit_s)
    whole = outcome.ended - outcome.started
    if len(outcome.steps) == steps:
        return {"rival": name, "seconds": whole, "extrapolated": False}
    median = statistics.median(b.time - a.time for a, b in pairwise(outcome.steps))
    missing = (steps - len(outcome.steps)) * median
    return {"rival": name, "seconds": whole + missing, "extrapolated": True, "steps_done": len(outcome.steps)}


def main(argv: Sequence[str] | None = None) -> int:
    p = sft_parser(__doc__)
    p.set_defaults(only="ours,trl_default,trl_best", seconds=120.0)
    p.add_argument("--limit", type=float, default=12.0, help="minutes for each rival (%(default)s)")
    args = p.parse_args(argv)
    stop_like_ctrl_c()
    about = machine(args.threads)
    rows: list[dict[str, Any]] = []
    with prepared(args) as s:
        task, steps = sized(s, steps_for(s, args.seconds))
        say(f"{steps} steps of {s.batch} rows, {task.epochs} epochs")
        try:
            for name in dict.fromkeys(("ours", *s.only)):
                rows.append(ours(s, task) if name == "ours" else theirs(s, name, task, args.limit * 60))
                guess = ", extrapolated" if rows[-1]["extrapolated"] else ""
                say(f"  {name}: {rows[-1]['seconds']:.0f} s{guess}")
        except KeyboardInterrupt:
            say("Stopped. What was measured so far is kept.")
        settings = {"model": s.model, "tuner": s.tuner, "batch": s.batch, "steps": steps, "data": args.data.name}
    mine = next((r["seconds"] for r in rows if r["rival"] == "ours"), None)
    ratios = {r["rival"]: r["seconds"] / mine for r in rows if mine and r["rival"] != "ours"}
    save({"ratios": ratios, "rows": rows, "settings": settings, "machine": about}, args.json)
    for name, ratio in ratios.items():
        say(f"everything included, ours is {ratio:.1f} times as fast as {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
