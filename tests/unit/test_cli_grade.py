"""`tunewright grade`: the mean, the spread, what could not be graded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunewright.cli import main
from tunewright.cli.commands.grade import histogram

SAME = (
    "type: string_check\nname: same\ninput: '{{ sample.output_text }}'\nreference: '{{ item.want }}'\noperation: eq\n"
)


def run(folder: Path, rows: list[Any], spec: str = SAME, *options: str) -> int:
    (folder / "g.yaml").write_text(spec)
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    home = ("--home", str(folder / "home"))
    return main.run(["grade", str(folder / "g.yaml"), str(folder / "rows.jsonl"), *home, *options])


def chat(said: str, **item: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": said}], **item}


def test_rewards_and_their_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [chat("a", want="a"), chat("b", want="a"), {"completion": "a", "want": "a"}]
    rows.append({"sample": "c", "item": {"want": "c"}, "step": 1})
    assert run(tmp_path, rows) == 0
    out = capsys.readouterr().out
    assert "rows.jsonl: 4 rows, mean reward 0.75 (standard error 0.25), lowest 0, highest 1" in out
    assert f"  0  {'#' * 14:<40}  1\n  1  {'#' * 40}  3\n" in out


def test_parts_of_a_multi_and_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = {
        "type": "string_check",
        "name": "p",
        "input": "{{ sample.output_text }}",
        "operation": "eq",
        "reference": "x",
    }
    multi = {"type": "multi", "name": "m", "calculate_output": "a / b"}
    multi["graders"] = {"a": {**part, "reference": "x"}, "b": {**part, "reference": "{{ item.want }}"}}
    assert run(tmp_path, [chat("x", want="x"), chat("x", want="y"), chat("x", other=1)], json.dumps(multi)) == 1
    out = capsys.readouterr().out
    assert "  a: mean 1\n  b: mean 0.3333\n" in out
    assert "formula_parse_error: 2 rows, the first in line 2" in out
    assert "invalid_variable_error: 1 rows, the first in line 3" in out


def test_one_object_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, [chat("a", want="a"), chat("b", want="a")], SAME, "--json", "--limit", "1") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {"line": 1, "reward": 1.0, "sub_rewards": {}, "errors": {}, "why": ""}


def test_a_grader_knows_the_prompt_as_in_a_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The messages before the answer that is graded; that one is no reference of its own."""
    spec = SAME.replace("{{ item.want }}", "{{ item.messages[0].content }}")
    assert run(tmp_path, [chat("q"), chat("a")], spec) == 0
    assert "mean reward 0.5" in capsys.readouterr().out
    assert run(tmp_path, [chat("q")], SAME.replace("{{ item.want }}", "{{ item.reference_answer }}")) == 64
    assert "no row has 'reference_answer'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "spec", "words"),
    [
        ([chat("a", wnat="a")], SAME, "Did you mean 'wnat'"),
        ([{"want": "a"}], SAME, "line 1: has no answer"),
        ([chat("a", want="a")], "type: [", "is not YAML"),
        ([chat("a", want="a")], "just text", "A grader is an object"),
    ],
)
def test_what_is_wrong_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[Any], spec: str, words: str
) -> None:
    assert run(tmp_path, rows, spec) in (64, 65)
    assert words in capsys.readouterr().err


def test_a_file_is_checked_for_what_a_grader_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"q{i}", "completion": "a", **({} if i in (3, 7) else {"want": "a"})} for i in range(12)]
    assert run(tmp_path, rows) == 1
    capsys.readouterr()
    check = ["data", "check", str(tmp_path / "rows.jsonl"), "--grader", str(tmp_path / "g.yaml")]
    assert main.run(check) == 1
    out = capsys.readouterr().out
    assert "rows.jsonl line 4 [want]: '{{ item.want }}' has no value" in out and "line 8" in out
    assert out.rstrip().endswith("2 variables of the grader are missing.")
    run(tmp_path, [{"prompt": f"q{i}", "completion": "a", "want": "b"} for i in range(12)])
    capsys.readouterr()
    assert main.run(check) == 0 and "No problems found." in capsys.readouterr().out


def test_a_histogram_of_many_values() -> None:
    lines = histogram([i / 100 for i in range(101)])
    assert len(lines) == 10 and lines[0].split() == ["0", "to", "0.1", "#" * 37, "10"]
    assert lines[-1].split() == ["0.9", "to", "1", "#" * 40, "11"]
