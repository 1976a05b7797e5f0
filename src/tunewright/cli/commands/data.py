"""`tunewright data …`: look at a data file before training on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from tunewright.core.errors import DataReport
    from tunewright.core.home import Home
    from tunewright.data.render import RenderReport

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)


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
    grader: Annotated[
        Path | None, typer.Option(help="Also look whether every row has what this grader (YAML or JSON) names.")
    ] = None,
    home: Annotated[Path | None, typer.Option(help="The data folder.", show_default="~/.tunewright")] = None,
) -> None:
    """Check every row of FILE. The exit code is 1 when something is wrong."""
    from rich.console import Console

    from tunewright.cli.report import print_report
    from tunewright.core.home import find_home
    from tunewright.data.validate import check_file

    console = Console()
    report = check_file(file, format=format, min_examples=min_examples, limit=limit)
    print_report(file.name, report, console)
    if report.n_problems:
        console.print(f"{report.n_problems:,} problems.", style="red", highlight=False)
        raise typer.Exit(1)
    if grader is not None and find_missing(file, grader, limit, console):
        raise typer.Exit(1)
    if model is not None:
        count_tokens(file, report, model, max_length, find_home(home).ensure(), console)
    console.print("No problems found.", style="green")


def find_missing(file: Path, grader: Path, limit: int, console: Console) -> int:
    """How many variables of a grader have no value in a row; prints up to `limit` of them."""
    from tunewright.cli.commands.grade import read_spec
    from tunewright.cli.report import print_problems
    from tunewright.core.conversation import item_of
    from tunewright.core.errors import Problem
    from tunewright.data.sources import read_rows
    from tunewright.graders.base import Seams, nobody, parse_grader
    from tunewright.graders.rows import missing_variables

    items = ((line, item_of(row)) for line, row in read_rows(file) if not isinstance(row, Problem))
    with parse_grader(read_spec(grader), seams=Seams(ask=nobody)) as checked:
        problems = list(missing_variables(checked, items))
    if problems:
        print_problems(file.name, problems[:limit], len(problems), console)
        console.print(f"{len(problems):,} variables of the grader are missing.", style="red", highlight=False)
    return len(problems)


def count_tokens(
    file: Path, found: DataReport, model: str, max_length: int | None, home: Home, console: Console
) -> None:
    """Render the rows as training would, and print how long they are. Prints and raises what cannot be rendered."""
    from tunewright.cli.report import print_problems
    from tunewright.cli.store_model import context_of, tokenizer_folder
    from tunewright.core.errors import DataError
    from tunewright.data.render import RenderReport, render_rows
    from tunewright.data.tokenizer import Tokenizer
    from tunewright.data.validate import read_conversations

    folder = tokenizer_folder(model, home)
    limit = max_length or context_of(folder)
    tokenizer = Tokenizer.load(folder)
    report, lengths = RenderReport(), []
    rows = read_conversations(file, found.format)
    try:
        for group in render_rows(
            rows, tokenizer, shape=found.shape, max_length=limit or 1 << 20, overlong="drop", report=report
        ):
            lengths.append(group.n_tokens)
    except DataError as e:
        print_problems(file.name, e.problems, report.n_problems, console)
        raise
    for line in token_lines(report, sorted(lengths), model, limit):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def token_lines(report: RenderReport, lengths: list[int], model: str, limit: int | None) -> list[str]:
    """What rendering found: tokens in all, tokens that are learned, the spread of lengths, rows that are too long."""
    lines = [f"With {model}: {report.tokens:,} tokens an epoch, of which {report.supervised_tokens:,} are learned"]
    if lengths:
        middle, high = lengths[len(lengths) // 2], lengths[int(0.95 * (len(lengths) - 1))]
        lines.append(f"Tokens a row: median {middle:,}, 95 % up to {high:,}, longest {report.longest:,}")
    if report.end_of_turn:
        lines.append(f"Trained turns end with {report.end_of_turn}")
    if report.overlong:
        lines.append(
            f"{report.overlong:,} rows are longer than {limit:,} tokens; the job's `overlong` says what becomes of "
            "them (error, truncate or drop)"
        )
    return [*lines, *(f"Note: {note}" for note in report.notes)]
