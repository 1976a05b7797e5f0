"""Which earlier run a demo keeps or continues, what it prints, and that it needs no torch."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from tunewright.cli import demo_view
from tunewright.cli.commands.demo import MARK, demo_spec, earlier_runs
from tunewright.core.events import EventWriter
from tunewright.core.home import Home
from tunewright.core.run import ARTEFACT, JobFile, Run
from tunewright.core.spec import JobSpec
from tunewright.data.demo import HELDOUT, TRAIN, load
from tunewright.evals import clinic


def make_run(home: Home, name: str, spec: JobSpec, status: str | None) -> Run:
    """A run folder whose only attempt ended with `status` (None: killed)."""
    run = Run(home.runs / name)
    run.folder.mkdir()
    run.write_job(JobFile(id=name, created_at=time.time(), name=f"ft:m:o::{name}", base="m", spec=spec, train="data/x"))
    writer = EventWriter(run.attempt(1) / "events.jsonl", 1)
    if status is not None:
        writer.write("end", "", {"status": status})
    writer.close()
    if status == "succeeded":
        run.result.mkdir()
        (run.result / ARTEFACT).write_text("{}")
    at = len(list(home.runs.iterdir()))
    os.utime(run.folder / "job.json", (at, at))
    return run


def test_nothing_to_keep_or_continue_at_first(home: Home) -> None:
    assert earlier_runs(home, demo_spec()) == (None, None)


@pytest.mark.parametrize("status", [None, "interrupted", "paused"])
def test_an_unfinished_demo_is_continued(home: Home, status: str | None) -> None:
    done = make_run(home, "aaaaaaaa", demo_spec(), "succeeded")
    torso = make_run(home, "bbbbbbbb", demo_spec(), status)
    assert earlier_runs(home, demo_spec()) == (done, torso)


def test_a_failed_demo_is_not_continued(home: Home) -> None:
    make_run(home, "aaaaaaaa", demo_spec(), "failed")
    assert earlier_runs(home, demo_spec()) == (None, None)


def test_an_old_torso_is_left_alone_after_a_finished_demo(home: Home) -> None:
    make_run(home, "aaaaaaaa", demo_spec(), "interrupted")
    done = make_run(home, "bbbbbbbb", demo_spec(), "succeeded")
    assert earlier_runs(home, demo_spec()) == (done, None)


def test_other_data_or_settings_are_another_demo(home: Home) -> None:
    """Nothing stale is used again: neither a model nor a torso of another version of the demo, nor any other job."""
    stale = demo_spec().model_copy(update={"metadata": {MARK: "0" * 16}})
    make_run(home, "aaaaaaaa", stale, "succeeded")
    make_run(home, "bbbbbbbb", demo_spec().model_copy(update={"metadata": None}), "succeeded")
    make_run(home, "cccccccc", stale, "interrupted")
    assert earlier_runs(home, demo_spec()) == (None, None)


def test_the_few_shot_prompt_has_three_training_examples_of_every_urgency() -> None:
    train, heldout = load(TRAIN), load(HELDOUT)
    shots = clinic.examples(train)
    rows = [row for row in train if (row.message, row.answer) in shots]
    assert {row.urgency for row in rows} == {"emergency", "urgent", "routine"}
    assert len({row.department for row in rows}) == 3
    chats = clinic.prompts(clinic.FEW_SHOT, train, heldout)
    assert [len(chat) for chat in chats] == [8] * len(heldout)
    assert clinic.prompts(clinic.TUNED, train, heldout)[0] == [{"role": "user", "content": heldout[0].message}]


def test_the_right_answers_score_full_marks_and_the_baselines_do_not() -> None:
    train, heldout = load(TRAIN), load(HELDOUT)
    perfect = clinic.score(clinic.TUNED, [row.answer for row in heldout], heldout)
    assert {m: sum(o) for m, o in perfect.outcomes.items()} == {"valid_json": 100, "department": 100, "urgency": 100}
    majority, tfidf = clinic.baselines(train, heldout)
    assert sum(majority.outcomes["department"]) <= 15
    assert sum(majority.outcomes["department"]) < sum(tfidf.outcomes["department"]) < 80


def test_results_in_plain_lines() -> None:
    train, heldout = load(TRAIN), load(HELDOUT)
    answers = {clinic.BASE: ["[red]So sorry[/]"] * 100, clinic.TUNED: [row.answer for row in heldout]}
    cards = [clinic.score(name, said, heldout) for name, said in answers.items()]
    out = io.StringIO()
    demo_view.show_results(Console(file=out, width=100), heldout, answers, [*cards, *clinic.baselines(train, heldout)])
    text = out.getvalue()
    assert "100 % (96-100)" in text and "0 % (0-4)" in text
    assert "[red]So sorry[/]" in text
    assert text.count("patient") >= demo_view.SHOWN_ROWS
    assert "better" in text and "TF-IDF" in text


def test_progress_without_a_terminal_is_a_few_lines() -> None:
    out = io.StringIO()
    with demo_view.counter(Console(file=out, width=80), "answers", 50) as tick:
        assert [tick(str(i), "base") for i in range(50)] == [str(i) for i in range(50)]
    assert out.getvalue().splitlines() == ["answers: 1/50 (base)", "answers: 50/50 (base)"]


def test_shorten() -> None:
    assert demo_view.shorten("a\n b\t c") == "a b c"
    assert len(demo_view.shorten("word " * 100)) <= demo_view.SHORT


def test_the_demo_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; import tunewright.cli.commands.demo, tunewright.cli.demo_view, tunewright.evals.baselines; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
