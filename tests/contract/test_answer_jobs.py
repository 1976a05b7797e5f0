"""Whole jobs that learn a teacher's answers: asked once, paused when it is away, resumed, in the real worker."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from job_kit import attempt, checked, weights

import tiny
from teacher_kit import TeacherServer, completion, teacher_server
from tunewright.core import outbound
from tunewright.core.errors import EndpointDown, SpecError
from tunewright.core.home import Home
from tunewright.core.run import Run
from tunewright.jobs.launchers.local import start_worker
from tunewright.jobs.prepare import create_run
from tunewright.train import asking as train_asking
from tunewright.train.asking import answers_of

PROMPTS = [{"prompt": f"Question {i}: what colour is {tiny.THINGS[i % 8]}?"} for i in range(12)]


def green(body: dict[str, Any]) -> Any:
    return 200, completion("It is green.")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy teacher is asked a second time at once, and then no more."""
    monkeypatch.setattr(train_asking, "Teacher", partial(train_asking.Teacher, back_off=(0.0,)))


def new_run(home: Home, url: str, **options: Any) -> Run:
    train = tiny.write_rows(home.root / "train.jsonl", PROMPTS)
    objective = {"name": "answers", "endpoint": url, "model": "big", "concurrency": 1, **options}
    fields = {
        "model": "tiny", "training_file": "train", "dtype": "float32", "threads": 1, "seed": 1, "n_epochs": 2,
        "batch_size": 4, "path": "plain", "tuner": {"name": "lora", "r": 4}, "learning_rate": 1e-2,
    }  # fmt: skip
    made = checked({**fields, "objective": objective})
    return create_run(home, made, train_path=train)


def allow(monkeypatch: pytest.MonkeyPatch, server: TeacherServer) -> None:
    monkeypatch.setenv(outbound.VARIABLE, f"{server.url}=TEACHER_KEY")
    monkeypatch.setenv("TEACHER_KEY", "sk-teacher")


def test_answers_are_asked_once_and_learned(tiny_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with teacher_server(lambda body: green(body) if len(server.seen) <= 5 else (503, None)) as server:
        allow(monkeypatch, server)
        run = new_run(tiny_home, server.url)
        with pytest.raises(EndpointDown, match="resume the job later"):
            attempt(run, tiny_home)
        first = len(server.seen)
        server.answer = green
        attempt(run, tiny_home, 2)
        assert server.seen[0][1]["Authorization"] == "Bearer sk-teacher"
        # five were kept; those that failed were asked again
        assert len(server.seen) == first + 7
        again = new_run(tiny_home, server.url)
        attempt(again, tiny_home)
        assert len(server.seen) == first + 7 and weights(again) == weights(run)
    rows = [json.loads(line) for line in answers_of(run, "train").read_text().splitlines()]
    assert [r["messages"][-1]["content"] for r in rows] == ["It is green."] * 12
    assert [r["messages"][0]["content"] for r in rows] == [p["prompt"] for p in PROMPTS]
    said = [e for e in run.events() if "answers" in e.data]
    assert said[-1].data["answers"]["answered"] == 12 and "big answered 12 of 12 rows" in said[-1].message
    losses = [e.data["train_loss"] for e in run.events() if e.type == "metrics"]
    assert losses[-1] < losses[0]


def test_an_endpoint_that_is_not_listed_or_a_small_budget_is_refused(
    tiny_home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    with teacher_server(green) as server:
        with pytest.raises(SpecError, match="not one that this machine may call"):
            new_run(tiny_home, server.url)
        allow(monkeypatch, server)
        run = new_run(tiny_home, server.url, budget=25)
        with pytest.raises(SpecError, match=r"big gave 3 answers to train\.jsonl.*needs 10.*Raise the budget"):
            attempt(run, tiny_home)
    with pytest.raises(SpecError, match="needs its option 'model'"):
        new_run(tiny_home, server.url, model=None)


@pytest.mark.slow
def test_in_the_real_worker(tiny_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is told of this endpoint and its key and nothing else; a teacher that refuses ends the job clearly."""
    with teacher_server(green) as server:
        allow(monkeypatch, server)
        monkeypatch.setenv("OTHER_KEY", "sk-other")
        run = new_run(tiny_home, server.url)
        assert start_worker(run, tiny_home).wait(300) == 0
        assert server.seen[0][1]["Authorization"] == "Bearer sk-teacher"
        server.answer = lambda body: (401, {"error": {"message": "no such key: sk-teacher"}})
        refused = new_run(tiny_home, server.url, system="another question")
        assert start_worker(refused, tiny_home).wait(300) == 65
    end = refused.end()
    assert end is not None and "answered 401: no such key" in end.message
    logs = "".join(p.read_text() for r in (run, refused) for p in r.folder.rglob("*.jsonl"))
    assert "sk-teacher" not in logs and "sk-other" not in logs
