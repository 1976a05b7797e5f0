"""`python -m benchmarks.objectives` with the tiny model: every trial runs, is kept, and is a line of the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import objectives, objectives_page, objectives_trials
from benchmarks.objectives_rows import DIALOGUES, FILES, PAIRS, TEXTS
from benchmarks.objectives_trials import TRIALS
from benchmarks.process import Events, Outcome, job_spec
from benchmarks.rivals.shared import Task

import tiny
from tunewright.core.events import EventWriter
from tunewright.core.home import Home
from tunewright.core.spec import check_parts, parse_spec
from tunewright.jobs.prepare import create_run
from tunewright.train.describe import describe
from tunewright.train.run import run_job

pytestmark = pytest.mark.slow
N = 10


def in_this_process(task: Task, model: str, home: Home, limit_s: float) -> Outcome:
    """run_ours without a process of its own, which takes seconds."""
    spec = check_parts(parse_spec(job_spec(task, model)), describe())
    run = create_run(home, spec, job_id=f"ftjob-{Path(task.out).name}", train_path=Path(task.data))
    writer = EventWriter(run.attempt(1) / "events.jsonl", 1)
    end = run_job(run, home, writer, lambda: False)
    writer.close()
    events = Events(run)
    events.read()
    facts = {"plan": run.plan(), "end": end, "run": str(run.folder)}
    return Outcome(0.0, 0.0, 0.0, events.steps, 0, 0, 0, facts, run.result)


@pytest.fixture
def public(tmp_path: Path) -> Path:
    """A few rows more than are held out of each public set."""
    folder = tmp_path / "public"
    folder.mkdir()
    talks = [{"chosen": f"\n\nHuman: Hi {i}\n\nAssistant: Hello!", "rejected": f"\n\nHuman: Hi {i}\n\nAssistant: No."}
             for i in range(DIALOGUES + N)]  # fmt: skip
    texts = [{"text": row["messages"][-1]["content"] * 3} for row in tiny.sft_rows(TEXTS + N)]
    for name, rows in {"dpo_en": tiny.pair_rows(PAIRS + N), "hh": talks, "c4": texts}.items():
        tiny.write_rows(folder / FILES[name], rows)
    return folder


def trials(only: str, results: Path, *more: str) -> int:
    fixed = ["--model", "tiny", "--encoder", "tiny", "--threads", "1", "--dtype", "float32", "--seeds", "1"]
    return objectives.main([*fixed, "--rows", str(N), "--only", only, "--results", str(results), *more])


@pytest.mark.parametrize("only", ["dpo,classify", pytest.param("", marks=pytest.mark.nightly)])
def test_trials_run_and_become_lines(
    tiny_home: Home, tmp_path: Path, public: Path, only: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEWRIGHT_HOME", str(tiny_home.root))
    monkeypatch.setattr(objectives_trials, "run_ours", in_this_process)
    monkeypatch.setattr(objectives_trials, "addresses", lambda text: len(text) % 2 == 0)  # random answers differ in it
    results, names = tmp_path / "results", only.split(",") if only else list(TRIALS)
    assert trials(only, results, "--data", str(public)) == 0
    found: dict[str, Any] = {name: json.loads((results / f"{name}-1.json").read_text()) for name in names}
    for name, one in found.items():
        assert one["trial"] == name and one["seed"] == 1 and one["machine"]["threads"] == 1
        assert len(one["before"]) == len(one["after"]) > 0 and one["seconds"] > 0 and one["data"]["sha256"]
    lines = [line for line in objectives_page.section(list(found.values())).splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == names
    monkeypatch.setattr(objectives_trials, "run_ours", None)  # what is there is not run again
    before = {p.name: p.stat().st_mtime_ns for p in results.iterdir()}
    assert trials(only, results, "--data", str(public)) == 0
    assert {p.name: p.stat().st_mtime_ns for p in results.iterdir()} == before
    assert not (tiny_home.cache / "answers").exists()


def test_what_is_not_known_or_no_result_is_refused(tmp_path: Path) -> None:
    for args, text in {
        ("--only", "dpo,xyz"): "no trial xyz. Use some of: dpo,",
        ("--rows", "5"): "another folder with --results",
        ("--data", str(tmp_path / "gone")): "is no folder",
    }.items():
        with pytest.raises(SystemExit, match=text):
            objectives.main(list(args))


def test_the_section_takes_its_place_and_leaves_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setattr(objectives_page, "PAGE", page)
    monkeypatch.setattr(objectives_page, "section", lambda runs: "| new |")
    monkeypatch.setattr(objectives_page, "RESULTS", tmp_path)
    page.write_text("# A\n")
    with pytest.raises(SystemExit, match="no results yet"):
        objectives_page.write_section()
    (tmp_path / "dpo-1.json").write_text("{}")
    with pytest.raises(SystemExit, match="needs the lines"):
        objectives_page.write_section()
    page.write_text(f"# A\n\n{objectives_page.BEGIN}\nold\n{objectives_page.END}\n\nend\n")
    objectives_page.write_section()
    assert page.read_text() == f"# A\n\n{objectives_page.BEGIN}\n| new |\n{objectives_page.END}\n\nend\n"
