"""`tunewright models`: what can be trained and talked to here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def models(
    home: Annotated[Path | None, typer.Option(help="The data folder.", show_default="~/.tunewright")] = None,
) -> None:
    """List the base models this machine knows and the models it has trained."""
    from tunewright.core.home import find_home
    from tunewright.core.run import list_runs
    from tunewright.models.catalogue import list_models

    place = find_home(home)
    print("Base models")
    for info in list_models(place):
        print(f"  {info.name}\t{info.source}")
    names = [n for run in list_runs(place) for n in _callable(run)]
    print("Trained here" if names else "Trained here: none yet. `tunewright demo` makes the first one.")
    for name in names:
        print(f"  {name}")


def _callable(run) -> list[str]:  # noqa: ANN001
    return []
