"""`tunewright data …`: look at a data file before training on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def data() -> None:
    """Look at a data file before training on it."""


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="JSONL, JSON array, CSV or Parquet.", show_default=False)],
    format: Annotated[str, typer.Option(help="The row format; auto looks at the rows and says why.")] = "auto",
    model: Annotated[
        str | None, typer.Option(help="Also render the rows with this model's template and count tokens.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Problems to show.")] = 100,
    min_examples: Annotated[int, typer.Option(min=1, help="Fewer rows than this are a problem.")] = 10,
    max_length: Annotated[int | None, typer.Option(min=8, help="With --model: tokens a row may have.")] = None,
    home: Annotated[Path | None, typer.Option(help="The data folder.", show_default="~/.tunewright")] = None,
) -> None:
    """Check every row of FILE. The exit code is 1 when something is wrong."""
    from rich.console import Console

    from tunewright.cli.report import print_report
    from tunewright.data.validate import check_file

    console = Console()
    report = check_file(file, format=format, min_examples=min_examples, limit=limit)
    print_report(file.name, report, console)
    if report.n_problems:
        console.print(f"{report.n_problems:,} problems.", style="red", highlight=False)
        raise typer.Exit(1)
    if model is not None:
        _count(file, report.format, model, max_length, home, console)
    console.print("No problems found.", style="green")


def _count(file: Path, format: str, model: str, max_length: int | None, home: Path | None, console: Console) -> None:
    """Render the rows as training would and print how many tokens they have."""
    raise NotImplementedError(file, format, model, max_length, home, console)
