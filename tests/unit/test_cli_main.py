"""The command line: what it imports, how it says errors, that each command is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunewright.cli import main
from tunewright.core.errors import Busy, CheckpointError, DiskFull, SpecError, UserError

HEAVY = ("torch", "transformers", "peft", "numpy", "pyarrow", "sklearn", "sqlalchemy", "fastapi", "nicegui")


def imported(*args: str) -> set[str]:
    """The top-level packages that a real `tunewright …` process has imported when it ends."""
    code = (
        "import sys, json; from tunewright.cli.main import run; run(sys.argv[1:]); print(json.dumps(list(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize("args", [["--help"], ["version"], ["train", "--help"], ["no-such-command"]], ids=" ".join)
def test_the_command_line_imports_nothing_heavy(args: list[str]) -> None:
    assert not imported(*args) & set(HEAVY)


def test_every_command_loads_and_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in main.COMMANDS:
        assert main.run([name, "--help"]) == 0
        assert f"tunewright {name}" in capsys.readouterr().out
        assert main.load_command(name).help, name


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in main.COMMANDS)
    assert "..." not in out.partition("Commands:")[2], "a command's first line must fit"


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([]) == 0
    captured = capsys.readouterr()
    assert "Usage: tunewright" in captured.out and not captured.err


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["up", "--prot", "1"], "No such option: --prot. Did you mean '--port'?"),
        (["data", "chek", "x"], "No such command 'chek'. Did you mean 'check'?"),
        (["chat"], "Missing argument 'model'"),
        (["up", "--port", "x"], "Invalid value for '--port'"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_wrong_command_line_is_one_line(args: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(args) == main.USAGE
    captured = capsys.readouterr()
    assert captured.err.startswith(f"Error: {expected}")
    assert captured.err.count("\n") == 1 and not captured.out
    assert "--help` shows what there is." in captured.err


@pytest.mark.parametrize("error", [UserError, SpecError, Busy, DiskFull, CheckpointError], ids=lambda e: e.__name__)
def test_a_known_error_is_its_message_and_its_exit_code(
    error: type[UserError], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version() -> None:
        raise error("The thing is wrong.")

    monkeypatch.setattr("tunewright.cli.commands.version.version", version)
    assert main.run(["version"]) == error.exit_code
    assert capsys.readouterr().err == "Error: The thing is wrong.\n"


def test_a_defect_of_ours_is_one_line_and_a_file(tmp_path: Path) -> None:
    code = (
        "import tunewright.cli.commands.version as v, tunewright.cli.main as m\n"
        "def version(): raise KeyError('inside')\n"
        "v.version = version\nm.main(['version'])"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "KeyError: 'inside'" in done.stderr
    (report,) = tmp_path.glob("tunewright-error-*.txt")
    assert str(report) in done.stderr and "Traceback" in report.read_text()
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**env, "TUNEWRIGHT_DEBUG": "1"}, check=False
    )
    assert "Traceback" in shown.stderr


def test_errors_are_red_on_a_terminal_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    main.show_error("x")
    assert capsys.readouterr().err == "\x1b[31mError: x\x1b[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    main.show_error("x")
    assert capsys.readouterr().err == "Error: x\n"
