"""Whether the disk has room for a job that paused because it was full."""

from __future__ import annotations

import shutil

from tunewright.core.errors import StateError
from tunewright.core.home import Home
from tunewright.core.run import Run
from tunewright.jobs.rows import JobRow

LEAST_BYTES = 16 << 20
AUTOMATIC_BYTES = 1 << 30


def waits_for(job: JobRow) -> bool:
    """Whether the job paused because the disk was full."""
    return job.status == "paused" and (job.error or {}).get("code") == "disk_full"


def needed(run: Run) -> int:
    """Bytes that the next checkpoint and the result may take: three times the largest checkpoint so far."""
    sizes = [
        sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        for folder in (run.checkpoints.iterdir() if run.checkpoints.is_dir() else ())
    ]
    return 3 * max(sizes, default=0)


def enough(home: Home, run: Run, least: int = LEAST_BYTES) -> bool:
    """Whether there is room for the job to go on; `least` bytes at any rate."""
    return shutil.disk_usage(home.root).free >= max(least, needed(run))


def require(home: Home, run: Run) -> None:
    """Raise StateError that says how much must be freed."""
    if not enough(home, run):
        free, want = shutil.disk_usage(home.root).free, max(LEAST_BYTES, needed(run))
        raise StateError(
            f"The disk is still full: {free / 1e6:.0f} MB are free, the job {run.id} needs about {want / 1e6:.0f} MB. "
            "Free some space, then resume the job."
        )
