"""The table of `recipe compare`: the task found in the rows, spread and intervals, the sentence at the end."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import tiny
from tunewright.cli import comparing
from tunewright.core.errors import DataError, SpecError
from tunewright.core.home import Home
from tunewright.data.demo import DEPARTMENTS, HELDOUT, TRAIN, URGENCIES
from tunewright.evals.clinic import TASK
from tunewright.evals.compare import Measured, Variant, conclusion, lines, mean_share, verdicts
from tunewright.evals.rows import LabelTask, ObjectTask, find_task, read_pairs
from tunewright.evals.task import Scorecard
from tunewright.metrics.intervals import wilson


def card(name: str, *rights: bool) -> Scorecard:
    return Scorecard(name, {"team": list(rights)})


def measured(system: str, name: str, *rights: bool) -> Measured:
    return Measured(Variant(system, name, base="m"), card(f"{system}, {name}", *rights), [], 100.0, 10.0, 0.5)


def test_the_demo_s_task_is_found_in_its_rows() -> None:
    task = find_task([p.answer for p in read_pairs(TRAIN)], TASK.instruction)
    assert isinstance(task, ObjectTask) and task.task.instruction == TASK.instruction
    assert {k: set(v) for k, v in task.labels.items()} == {"department": set(DEPARTMENTS), "urgency": set(URGENCIES)}
    assert task.task.texts == ("reason",)
    rows = read_pairs(HELDOUT)
    perfect = task.score("x", [r.answer for r in rows], [r.answer for r in rows])
    assert {m: sum(o) for m, o in perfect.outcomes.items()} == {"valid_json": 100, "department": 100, "urgency": 100}
    assert all("schema" in str(options) for options in task.prompts().values()) and len(task.prompts()) == 3


def test_labels_as_answers_and_as_rows(tmp_path: Path) -> None:
    rows = read_pairs(tiny.write_rows(tmp_path / "labels.jsonl", tiny.label_rows(12)))
    task = find_task([r.answer for r in rows], "Name the colour.")
    assert isinstance(task, LabelTask) and task.options == ("blue", "green", "red")
    assert task.score("x", ["red ", "It is red.", "red"], ["red", "red", "blue"]).outcomes == {
        "answer": [True, False, False]
    }


def test_free_text_has_no_right_answer() -> None:
    with pytest.raises(DataError, match="neither JSON objects"):
        find_task([f"an answer of its own, number {i}" for i in range(20)], "")
    with pytest.raises(DataError):
        find_task([json.dumps({"a": i}) for i in "abcdefgh"], "")


def test_the_mean_of_variants_has_an_interval_over_rows() -> None:
    """One variant: Wilson's. Copies of one variant say no more than it does: the rows are not independent."""
    one = card("a", *([True] * 30 + [False] * 20))
    assert mean_share([one], "team") == mean_share([one] * 5, "team") == wilson(30, 50)
    half = mean_share([card("a", True, True), card("b", True, False)], "team")
    assert half == wilson(1.5, 2) and half.value == 0.75
    found = lines([measured("few", "0", True, True, False), measured("few", "1", True, False, False)])[0]
    assert found.n_variants == 2 and found.spread["team"] == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert found.shares["team"].value == pytest.approx(0.5) and found.prompt_tokens == 100


def test_the_sentence_at_the_end() -> None:
    good, bad = [True] * 60, [False] * 60
    better = verdicts(card("tuned", *good), [card("prompt, a", *bad), card("few-shot", *bad)], {"team": ()})
    assert conclusion(better) == "Tuning pays here: on team it is surely better than anything without tuning."
    same = verdicts(card("tuned", *good), [card("prompt, a", *bad), card("few-shot", *good)], {"team": ()})
    assert "not shown to pay" in conclusion(same) and "on team few-shot" in conclusion(same)
    worse = verdicts(card("tuned", *bad), [card("few-shot", *good)], {"team": ()})
    assert conclusion(worse) == "On team few-shot did surely better than the tuned model."


def test_the_table_in_plain_lines() -> None:
    found = lines(
        [measured("base", "", True, False), measured("few", "0", True, True), measured("few", "1", False, True)]
    )
    out = io.StringIO()
    Console(file=out, width=120).print(comparing.table(found, [card("majority class", True, False)], ["team"]))
    text = out.getvalue()
    assert "few (x2)" in text and "[50-100]" in text and "majority class" in text and "0.50" in text


def test_half_of_the_files_is_an_error(home: Home) -> None:
    asked = comparing.Asked(None, None, Path("x"), None, [], None, 4, 3, None, 64, "e")
    with pytest.raises(SpecError, match="both --train and --heldout"):
        comparing.prepare(home, asked)


@pytest.mark.slow
def test_the_command_with_a_tiny_model(tiny_home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every row of the table is answered by a real engine process; nothing that was made for it stays."""
    import recipe_kit
    from tunewright.cli.main import run

    recipe_kit.add_encoder(tiny_home)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Row {i}: {tiny.THINGS[i % 8]}?"},
                {"role": "assistant", "content": tiny.COLOURS[i % 3]},
            ]
        }
        for i in range(18)
    ]
    train, heldout = tiny.write_rows(tmp_path / "t.jsonl", rows[:12]), tiny.write_rows(tmp_path / "h.jsonl", rows[12:])
    docs = recipe_kit.documents(tmp_path / "docs")
    tuned = recipe_kit.name_of(recipe_kit.make(tiny_home, {"name": "prompt", "system": "S."}, "tiny"))
    options = ["--model", "tiny", "--tuned", tuned, "--train", str(train), "--heldout", str(heldout), "--k", "2"]
    options += ["--documents", str(docs), "--seeds", "2", "--max-tokens", "4", "--encoder", recipe_kit.ENCODER]
    report = tmp_path / "report.json"
    assert run(["recipe", "compare", *options, "--json", str(report), "--home", str(tiny_home.root)]) == 0
    said, told = capsys.readouterr().out, json.loads(report.read_text())
    systems = {s["system"]: s for s in told["systems"]}
    assert list(systems) == ["base", "prompt", "few-shot, random", "few-shot, similar", "retrieval", "tuned"]
    assert [s["n_variants"] for s in systems.values()] == [1, 3, 2, 1, 1, 1]
    assert systems["few-shot, random"]["prompt_tokens"] > systems["prompt"]["prompt_tokens"]
    assert systems["prompt"]["prompt_tokens"] > systems["base"]["prompt_tokens"] > 0
    assert all(len(v["answers"]) == 6 for v in told["variants"]) and len(told["verdicts"]) == 1
    assert "majority class" in said and "s/answer" in said and "uning" in said
    assert list(tiny_home.cache.glob("compare-*")) == []
