"""Show a data report: what the file is, why we think so, and each problem with its line and field."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tunewright.core.errors import DataReport, Problem


def print_report(name: str, report: DataReport, console: Console) -> None:
    """The detection and its reason, the notes, then the problems (a table on a terminal, lines otherwise)."""
    _say(console, f"{name}: {report.n_rows:,} rows, format {report.format or 'not recognised'}")
    if report.reason:
        _say(console, f"Why: {report.reason}")
    for note in report.notes:
        _say(console, f"Note: {note}")
    if report.problems:
        print_problems(name, report.problems, report.n_problems, console)


def print_problems(name: str, problems: list[Problem], total: int, console: Console) -> None:
    """Up to 100 problems, and how many there are beyond them."""
    if console.is_terminal:
        console.print(_table(problems))
    else:
        for p in problems:
            where = f" [{p.field}]" if p.field else ""
            _say(console, f"{name} line {p.line}{where}: {p.message}")
    if total > len(problems):
        _say(console, f"… and {total - len(problems):,} more.")


def _table(problems: list[Problem]) -> Table:
    table = Table("line", "field", "what is wrong", box=SIMPLE)
    for p in problems:
        table.add_row(str(p.line), escape(p.field), escape(p.message))
    return table


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
