"""`tunewright models`: what can be trained and talked to here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tunewright.core.home import Home
    from tunewright.core.run import Run


def models(
    home: Annotated[Path | None, typer.Option(help="The data folder.", show_default="~/.tunewright")] = None,
) -> None:
    """List base models, recipes and what was trained here."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from tunewright.core.home import find_home

    place = find_home(home)
    rows = [*_base(place), *_recipes(place), *_tuned(place)]
    columns = ("model", "kind", "source")
    console = Console()
    if not console.is_terminal:
        print("\n".join("\t".join(row) for row in (columns, *rows)))
        return
    table = Table(*columns, box=SIMPLE)
    for name, kind, source in rows:
        table.add_row(name, kind, source)
    table.columns[0].overflow = "fold"
    console.print(table)
    console.print("`tunewright chat MODEL` talks to one; a job spec's `model:` takes any of them.", style="dim")


def _base(home: Home) -> list[tuple[str, str, str]]:
    from tunewright.models.catalogue import list_models

    return [
        (info.name, "base", info.source + (" (would be downloaded)" if info.needs_network else ""))
        for info in list_models(home)
    ]


def _tuned(home: Home) -> list[tuple[str, str, str]]:
    from tunewright.core.run import list_runs

    return [(name, kind, run.id) for run in list_runs(home) for name, kind in callable_models(run)]


def _recipes(home: Home) -> list[tuple[str, str, str]]:
    from tunewright.core.run import list_recipes, read_artefact

    records = [read_artefact(folder) for folder in list_recipes(home)]
    return [(r.name, "recipe", f"{(r.recipe or {}).get('name')} over {r.base}") for r in records]


def callable_models(run: Run) -> list[tuple[str, str]]:
    """(name, `tuned` or `checkpoint`) of everything of this run that answers to a name, checkpoints first."""
    from tunewright.core.run import ARTEFACT, read_artefact

    name = run.job().name
    last = read_artefact(run.result).step if (run.result / ARTEFACT).is_file() else None
    steps = sorted({e.data["step"] for e in run.events() if e.type == "checkpoint" and e.data.get("kind") == "epoch"})
    there = [s for s in steps if s != last and (run.checkpoint(s) / "artefact" / ARTEFACT).is_file()]
    final = [] if last is None else [(name, "tuned")]
    return [(f"{name}:ckpt-step-{s}", "checkpoint") for s in there] + final
