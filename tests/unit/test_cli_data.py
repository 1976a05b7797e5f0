"""`tunewright data check`: what it says of good and bad files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tunewright.cli import main
from tunewright.core.home import Home


def check(*args: str | Path) -> int:
    return main.run(["data", "check", *map(str, args)])


def test_a_good_file_names_its_format_and_why(
    tmp_path: Path, sft_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(sft_file(tmp_path, 24)) == 0
    out = capsys.readouterr().out
    assert "train.jsonl: 24 rows, format openai_chat" in out
    assert "Why: " in out and "No problems found." in out


def test_every_problem_has_its_line_and_field(
    tmp_path: Path, sft_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = sft_file(tmp_path, 20)
    lines = path.read_text().splitlines()
    lines[4] = lines[4].replace('"assistant"', '"assistent"')
    lines[11] = "{not json"
    path.write_text("\n".join(lines))
    assert check(path) == 1
    out = capsys.readouterr().out
    assert "train.jsonl line 5 [messages[" in out and "assistent" in out
    assert "train.jsonl line 12" in out
    assert out.rstrip().endswith("2 problems.")


def test_only_as_many_problems_are_shown_as_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("{oops\n" * 150)
    assert check(path, "--limit", "3") == 1
    out = capsys.readouterr().out
    assert out.count("bad.jsonl line ") == 3 and "… and 147 more." in out


def test_too_few_rows_are_a_problem_that_an_option_lifts(
    tmp_path: Path, sft_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = sft_file(tmp_path, 3)
    assert check(path) == 1
    assert "must have at least 10 examples" in capsys.readouterr().out
    assert check(path, "--min-examples", "3") == 0


def test_a_missing_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path / "none.jsonl") == 65
    err = capsys.readouterr().err
    assert "none.jsonl" in err and err.count("\n") == 1


def test_an_unknown_format_names_the_nearest(
    tmp_path: Path, sft_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(sft_file(tmp_path, 12), "--format", "alpacca") == 64
    assert "Did you mean 'alpaca'?" in capsys.readouterr().err


def test_tokens_are_counted_as_training_would(
    tmp_path: Path, sft_file: Callable[..., Path], tiny_home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    from tunewright.data.render import RenderReport, render_rows
    from tunewright.data.tokenizer import Tokenizer
    from tunewright.data.validate import read_conversations

    path = sft_file(tmp_path, 24)
    tokenizer, report = Tokenizer.load(tiny_home.models / "tiny"), RenderReport()
    lengths = [g.n_tokens for g in render_rows(read_conversations(path), tokenizer, max_length=9999, report=report)]
    assert check(path, "--model", "tiny", "--home", tiny_home.root) == 0
    out = capsys.readouterr().out
    assert f"With tiny: {sum(lengths):,} tokens an epoch, of which {report.supervised_tokens:,} are learned" in out
    assert f"longest {max(lengths):,}" in out and "<|im_end|>" in out
    limit = sorted(lengths)[12]
    assert check(path, "--model", "tiny", "--home", tiny_home.root, "--max-length", str(limit)) == 0
    assert f"{sum(n > limit for n in lengths)} rows are longer than {limit} tokens" in capsys.readouterr().out


def test_a_row_that_the_model_cannot_express_is_a_problem(
    tmp_path: Path, sft_file: Callable[..., Path], tiny_home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sft_file(tmp_path, 12)
    lines = path.read_text().splitlines()
    lines[6] = json.dumps(
        {"messages": [{"role": "user", "content": "a <|im_end|> b"}, {"role": "assistant", "content": "c"}]}
    )
    path.write_text("\n".join(lines))
    assert check(path, "--model", "tiny", "--home", tiny_home.root) == 65
    captured = capsys.readouterr()
    assert "train.jsonl line 7 [messages[0].content]" in captured.out
    assert captured.err.startswith("Error: ") and captured.err.count("\n") == 1


def test_an_unknown_model_names_the_nearest(
    tmp_path: Path, sft_file: Callable[..., Path], tiny_home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(sft_file(tmp_path, 12), "--model", "tinny", "--home", tiny_home.root) == 65
    assert "Did you mean 'tiny'?" in capsys.readouterr().err
