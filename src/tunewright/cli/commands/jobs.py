"""`tunewright jobs`: the runs in the data folder, read from their folders; no server is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tunewright.core.run import Run


def jobs(
    home: Annotated[Path | None, typer.Option(help="The data folder.", show_default="~/.tunewright")] = None,
) -> None:
    """List the fine-tuning jobs of the data folder, newest last."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from tunewright.core.home import find_home
    from tunewright.core.run import list_runs

    runs = list_runs(find_home(home))
    if not runs:
        print("No jobs yet. `tunewright demo` or `tunewright train job.yaml` makes one.")
        return
    columns = ("job", "status", "step", "loss", "created", "model")
    rows = [_row(run) for run in runs]
    console = Console()
    if not console.is_terminal:
        print("\n".join("\t".join(row) for row in (columns, *rows)))
        return
    table = Table(*columns, box=SIMPLE)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def status_of(run: Run) -> str:
    """The newest word on the job: of its worker, or of the server (a status of the API).

    A worker's: `running`, `succeeded`, `failed`, `paused`, `interrupted`, or `killed` (it left no word and is gone).
    """
    from tunewright.jobs import journal

    if run.is_active():
        return "running"
    given = [e for e in journal.read(run)[0] if "status" in (journal.changes_of(e) or {})]
    end = run.end()
    if end is not None and (not given or end.time > given[-1].time):
        return str(end.data.get("status"))
    if given and given[-1].data["job"]["status"] != "running":
        return str(given[-1].data["job"]["status"])
    return "killed" if any(run.attempts()) else "queued"


def _row(run: Run) -> tuple[str, ...]:
    from datetime import datetime

    job = run.job()
    steps = [e for e in run.events() if e.type == "metrics"]
    last = steps[-1].data if steps else None
    created = datetime.fromtimestamp(job.created_at).strftime("%Y-%m-%d %H:%M")
    step = f"{last['step']}/{last['total_steps']}" if last else ""
    model = " -> ".join(job.stages) or job.name
    return (run.id, status_of(run), step, f"{last['train_loss']:.4f}" if last else "", created, model)
