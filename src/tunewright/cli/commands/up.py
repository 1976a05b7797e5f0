"""`tunewright up`: the API and the dashboard as two child processes that are kept alive and stopped together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def up(
    host: Annotated[str, typer.Option(help="The address to listen on; 127.0.0.1 is this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65534, help="The API's port.")] = 8000,
    web_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="The dashboard's port.", show_default="the first free one after the API's"),
    ] = None,
    no_web: Annotated[bool, typer.Option("--no-web", help="Without the dashboard.")] = False,
    open: Annotated[bool, typer.Option("--open", help="Ask for no API key; only on this machine.")] = False,
    home: Annotated[Path | None, typer.Option(help="The data folder.", show_default="~/.tunewright")] = None,
) -> None:
    """Start the API, the job queue and the dashboard.

    A job that is training goes on by itself when the server stops; the next `tunewright up` finds it again.
    """
    from tunewright.cli import serving
    from tunewright.cli.processes import stop_all
    from tunewright.core.home import find_home

    place = serving.choose_place(find_home(home).ensure(), host, port, web_port, no_web, open)
    first_key = serving.make_first_key(place.home, open)
    children = serving.make_children(place)
    stops = serving.catch_stops()
    say("Starting tunewright …")
    if first_key is not None:
        say(f"API key:    {first_key}  (shown only now; `tunewright keys new` makes more)")
    try:
        code = serving.serve(place, children, stops, say)
    finally:
        say("Stopping …")
        stop_all(children[::-1], serving.STOP_SECONDS, lambda: len(stops) > 1)
        place.token_file.unlink(missing_ok=True)
        for line in serving.still_training(place.home):
            say(line)
    raise typer.Exit(code)


def say(text: str) -> None:
    print(text, flush=True)
