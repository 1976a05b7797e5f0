"""`tunewright doctor`: what works on this machine, what is missing, and the fix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MARKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "bad": ("BAD", "red")}


def doctor(
    home: Annotated[Path | None, typer.Option(help="The data folder.", show_default="~/.tunewright")] = None,
    host: Annotated[str, typer.Option(help="The address to check ports on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65534, help="The API's port; the dashboard's is the next.")] = 8000,
) -> None:
    """Say what works on this machine and how to fix what does not.

    The exit code is 1 if something is bad.
    """
    from rich.console import Console
    from rich.text import Text

    from tunewright.cli.health import run_checks
    from tunewright.core.home import find_home

    console = Console()
    bad = 0
    for check in run_checks(find_home(home), host, port):
        mark, colour = MARKS[check.level]
        bad += check.level == "bad"
        line = Text.assemble((f"{mark:<5}", colour), f"{check.name:<12} {check.text}")
        console.print(line, highlight=False, soft_wrap=True)
        if check.fix:
            console.print(Text(f"     {'':<12} → {check.fix}", style="dim"), highlight=False, soft_wrap=True)
    if bad:
        raise typer.Exit(1)
