"""The command `tunewright`: a table of commands, each imported only when it is asked for, and one way to show errors.

Start-up stays under 0.3 s because a command's module imports only typer and the standard library at its top; whatever
is heavy is imported inside the function. Nothing under cli/ imports torch.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from tunewright.core.errors import TunewrightError

# Command -> where it lives: a function (one command) or a typer.Typer (a group of commands). The order is the help's.
COMMANDS: dict[str, str] = {
    "demo": "tunewright.cli.commands.demo:demo",
    "up": "tunewright.cli.commands.up:up",
    "train": "tunewright.cli.commands.train:train",
    "chat": "tunewright.cli.commands.chat:chat",
    "models": "tunewright.cli.commands.models:models",
    "merge": "tunewright.cli.commands.merge:merge",
    "recipe": "tunewright.cli.commands.recipe:app",
    "jobs": "tunewright.cli.commands.jobs:jobs",
    "log": "tunewright.cli.commands.log:log",
    "data": "tunewright.cli.commands.data:app",
    "grade": "tunewright.cli.commands.grade:grade",
    "estimate": "tunewright.cli.commands.estimate:estimate",
    "keys": "tunewright.cli.commands.keys:app",
    "doctor": "tunewright.cli.commands.doctor:doctor",
    "version": "tunewright.cli.commands.version:version",
}
USAGE = 2


class LazyGroup(TyperGroup):
    """A group whose commands are the table's rows."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        self.commands = dict.fromkeys(COMMANDS, self)  # typer's did-you-mean looks at these keys
        return load_command(cmd_name) if cmd_name in COMMANDS else None


def load_command(name: str) -> Any:
    """Import one row of COMMANDS and return it as a typer command."""
    module, _, attribute = COMMANDS[name].partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if isinstance(found, typer.Typer):
        group = typer.main.get_command(found)
        group.name = name
        return group
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name)(found)
    return typer.main.get_command(single)


def build() -> Any:
    """The whole command line as one typer command."""
    app = typer.Typer(cls=LazyGroup, add_completion=False, rich_markup_mode=None)

    @app.callback(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
    def tunewright() -> None:
        """Fine-tuning you own: OpenAI's fine-tuning API, dashboard and playground on your own machine."""

    return typer.main.get_command(app)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit. Errors are one line on stderr; the exit code is the error's own."""
    sys.excepthook = _report_bug
    sys.exit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    try:
        code = build().main(args=args, prog_name="tunewright", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except TunewrightError as e:
        show_error(e.message)
        return e.exit_code
    except TyperException as e:
        return _usage_error(e)
    except typer.Abort:
        return 130


def show_error(message: str) -> None:
    """One line on stderr, red on a terminal."""
    red, off = ("\x1b[31m", "\x1b[0m") if _colours() else ("", "")
    print(f"{red}Error: {message}{off}", file=sys.stderr)


def _colours() -> bool:
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR")


def _usage_error(e: Any) -> int:
    """Unknown command or option, missing argument: what is wrong, the nearest match, where the help is."""
    if type(e).__name__ == "NoArgsIsHelpError":
        print(e.format_message())
        return 0
    message = e.message if getattr(e, "possibilities", None) else e.format_message()
    near = getattr(e, "possibilities", None)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    ctx = getattr(e, "ctx", None)
    where = ctx.command_path if ctx is not None else "tunewright"
    show_error(f"{message.rstrip('.')}.{hint} `{where} --help` shows what there is.".replace("?.", "?"))
    return USAGE


def _report_bug(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
    """An error we did not foresee: one line, and the details in a file (or here, with TUNEWRIGHT_DEBUG=1)."""
    text = "".join(traceback.format_exception(kind, value, trace))
    if os.environ.get("TUNEWRIGHT_DEBUG"):
        sys.stderr.write(text)
        return
    with tempfile.NamedTemporaryFile("w", prefix="tunewright-error-", suffix=".txt", delete=False) as f:
        f.write(text)
    show_error(f"a defect of tunewright: {kind.__name__}: {value}. Please report it with the file {f.name}.")


if __name__ == "__main__":
    main()
