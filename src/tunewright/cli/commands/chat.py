"""`tunewright chat MODEL`: talk to a base model, a tuned model or a checkpoint, without a server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tunewright.core.home import Home
    from tunewright.engine.client import EngineSession

HELP = "Enter sends, Ctrl-C stops an answer, /clear starts over, /quit or Ctrl-D ends."
Message = dict[str, Any]


def chat(
    model: Annotated[str, typer.Argument(help="A name of `tunewright models`, or a model folder.", show_default=False)],
    system: Annotated[str | None, typer.Option(help="A system message in front of the conversation.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 always takes the likeliest token.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 512,
    seed: Annotated[int | None, typer.Option(help="Makes sampled answers repeatable.")] = None,
    home: Annotated[Path | None, typer.Option(help="The data folder.", show_default="~/.tunewright")] = None,
) -> None:
    """Talk to MODEL in the terminal.

    When the input is not a terminal, each of its lines is a question of its own, answered in one go.
    """
    from tunewright.core.home import find_home
    from tunewright.engine.client import EngineSession

    place = find_home(home).ensure()
    options = {**find_model(model, place), "temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    start = [{"role": "system", "content": system}] if system else []
    with EngineSession(place) as engine:
        if sys.stdin.isatty():
            print(f"{model}. {HELP}", file=sys.stderr)
            converse(engine, options, start)
        else:
            for question in questions(sys.stdin):
                answer(engine, options, [*start, {"role": "user", "content": question}])


def find_model(name: str, home: Home) -> dict[str, str]:
    """{"base": …} or {"artefact": folder} of a model's name. Raises ModelNotFound with the nearest name."""
    from tunewright.cli.commands.models import callable_models
    from tunewright.core.errors import ModelNotFound, did_you_mean
    from tunewright.core.run import find_artefact, list_recipes, list_runs, read_artefact
    from tunewright.models.catalogue import resolve

    if not name.startswith("ft:"):
        resolve(name, home)
        return {"base": name}
    try:
        return {"artefact": str(find_artefact(home, name))}
    except ModelNotFound as e:
        known = [n for run in list_runs(home) for n, _ in callable_models(run)]
        known += [read_artefact(folder).name for folder in list_recipes(home)]
        raise ModelNotFound(f"{e.message}{did_you_mean(name, known)}", param="model") from e


def questions(lines: Iterator[str]) -> Iterator[str]:
    """The lines that hold something."""
    return (line.strip() for line in lines if line.strip())


def converse(engine: EngineSession, options: dict[str, Any], start: list[Message]) -> None:
    """Ask and answer until the end of the input. Ctrl-C in an answer keeps what was said so far."""
    import readline  # noqa: F401 gives input() its editing and history

    messages = list(start)
    while True:
        try:
            said = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if said == "/quit":
            return
        if said == "/clear":
            messages = list(start)
        elif said:
            messages.append({"role": "user", "content": said})
            messages.append({"role": "assistant", "content": answer(engine, options, messages)})


def answer(engine: EngineSession, options: dict[str, Any], messages: list[Message]) -> str:
    """Print one answer as it comes, and return it. On a terminal Ctrl-C ends it early."""
    said = ""
    try:
        for event in engine.stream({**options, "messages": messages}):
            if event["type"] == "token":
                said += event["text"]
                print(event["text"], end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    print()
    return said
