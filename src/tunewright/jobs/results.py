"""A finished job's step_metrics.csv as a file of the Files API, with an id that a rebuild gives it again."""

from __future__ import annotations

import os

from tunewright.core.durable import fsync_path, sha256_file
from tunewright.core.ids import random_part
from tunewright.core.run import Run
from tunewright.jobs.models import stable_id
from tunewright.jobs.prepare import link_or_copy
from tunewright.jobs.rows import FileRow, JobRow
from tunewright.jobs.store import Store


def register(store: Store, job: JobRow, run: Run) -> list[str]:
    """The ids of the job's result files; none when the worker left no step_metrics.csv. Doing it twice is harmless."""
    if not run.metrics_csv.is_file():
        return []
    digest = sha256_file(run.metrics_csv)
    blob = store.home.blob(digest)
    if not blob.exists():
        blob.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = blob.with_name(f".{random_part(8)}.tmp")
        link_or_copy(run.metrics_csv, draft)
        os.replace(draft, blob)
        fsync_path(blob)
        fsync_path(blob.parent)
    stat = blob.stat()
    row = FileRow(
        id=stable_id("file-", job.id, "step_metrics.csv"),
        bytes=stat.st_size,
        created_at=int(stat.st_mtime),
        filename="step_metrics.csv",
        purpose="fine-tune-results",
        sha256=digest,
    )
    store.add_file(row)
    return [row.id]
