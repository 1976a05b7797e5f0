"""How well the preflight predicts: six different jobs, predicted against measured peak memory and time.

    python -m benchmarks.preflight --json preflight.json

Each job runs to its end through the real worker; both numbers are in its end event. --scale 0.5 halves the jobs' rows.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.figures import machine
from benchmarks.make_data import DATA
from benchmarks.ours import Place, own_parser, placed
from benchmarks.process import RivalFailed
from benchmarks.settings import save, say, stop_like_ctrl_c


@dataclass(frozen=True)
class Job:
    """One job. data: a file of benchmarks/data. rows: so many of it. options: fields of the job spec."""

    name: str
    data: str
    rows: int
    tuner: str = "lora"
    r: int = 16
    batch: int = 8
    epochs: int = 1
    options: tuple[tuple[str, Any], ...] = ()


JOBS = (
    Job("short rows, r 16", "short", 304),
    Job("mixed rows, r 8", "mixed", 224, r=8),
    Job("mixed rows, r 64, two epochs", "mixed", 112, r=64, epochs=2),
    Job("long rows, r 16", "long", 48, batch=4),
    Job("short rows, full", "short", 160, tuner="full"),
    Job("long rows, full, small micro-batches", "long", 24, tuner="full", batch=2,
        options=(("micro_batch_tokens", 1024),)),
)  # fmt: skip
PAIRS = {
    "memory": ("predicted_peak_memory_bytes", "peak_memory_bytes"),
    "time": ("predicted_seconds", "seconds"),
}


def measure(place: Place, job: Job, scale: float) -> dict[str, Any]:
    """One job's predictions, measurements and their errors (predicted / measured - 1)."""
    rows = (DATA / f"{job.data}.jsonl").read_text(encoding="utf-8").splitlines()
    data = place.work / f"{job.data}-{job.rows}.jsonl"
    n = max(2 * job.batch, round(job.rows * scale))
    data.write_text("\n".join(rows[:n]) + "\n", encoding="utf-8")
    name = f"job-{JOBS.index(job) + 1 if job in JOBS else 0}"
    outcome = place.run(name, data, job.tuner, r=job.r, alpha=2 * job.r, batch=job.batch, epochs=job.epochs,
                        steps=1 << 30, options=dict(job.options))  # fmt: skip
    end = outcome.facts["end"]
    row: dict[str, Any] = {"job": job.name, "rows": n, "steps": len(outcome.steps)}
    for what, (predicted, measured) in PAIRS.items():
        row |= {predicted: end[predicted], measured: end[measured], f"{what}_error": end[predicted] / end[measured] - 1}
    return {**row, "vm_hwm_bytes": outcome.peak_bytes, "wall_s": outcome.ended - outcome.started}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Median and worst size of each error."""
    out = {}
    for what in PAIRS:
        sizes = [abs(r[f"{what}_error"]) for r in rows if f"{what}_error" in r]
        if sizes:
            out |= {f"median_{what}_error": statistics.median(sizes), f"worst_{what}_error": max(sizes)}
    return out


def main(argv: Sequence[str] | None = None, jobs: Sequence[Job] = JOBS) -> int:
    p = own_parser(__doc__)
    p.add_argument("--scale", type=float, default=1.0, help="factor on the rows of each job (%(default)s)")
    args = p.parse_args(argv)
    stop_like_ctrl_c()
    rows: list[dict[str, Any]] = []
    with placed(args) as place:
        about = machine(place.threads)
        try:
            for job in jobs:
                say(job.name)
                try:
                    rows.append(measure(place, job, args.scale))
                except RivalFailed as e:
                    rows.append({"job": job.name, "error": str(e)})
                    say(f"  {e}")
                    continue
                say("  " + "; ".join(line(rows[-1])))
        except KeyboardInterrupt:
            say("Stopped. What was measured so far is kept.")
    found = {"summary": summary(rows), "rows": rows, "model": args.model, "machine": about}
    save(found, args.json)
    say(json.dumps(found["summary"]))
    return 0


def line(row: dict[str, Any]) -> list[str]:
    gb = 1e9
    return [
        f"memory {row['predicted_peak_memory_bytes'] / gb:.2f} GB predicted, {row['peak_memory_bytes'] / gb:.2f} "
        f"measured ({row['memory_error']:+.0%})",
        f"time {row['predicted_seconds']:.1f} s predicted, {row['seconds']:.1f} measured ({row['time_error']:+.0%})",
    ]


if __name__ == "__main__":
    sys.exit(main())
