"""Whole jobs that learn what a judge prefers: sampled or given pairs, paused when it is away, labelled by its rule."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from job_kit import attempt, stop_after, weights

import tiny
from teacher_kit import TeacherServer, completion, teacher_server
from tunewright.core import outbound
from tunewright.core.errors import EndpointDown, Interrupted, SpecError
from tunewright.core.home import Home
from tunewright.core.run import Run
from tunewright.core.spec import check_parts, parse_spec
from tunewright.jobs.prepare import create_run
from tunewright.train import candidates
from tunewright.train import judging as train_judging
from tunewright.train.asking import answers_of
from tunewright.train.describe import describe

N = 20
PROMPTS = [{"prompt": f"Question {i}: what colour is {tiny.THINGS[i % 8]}?"} for i in range(N)]


def answers_in(body: Any) -> list[str]:
    return re.findall(r"<answer \d>\n(.*?)\n</answer \d>", body["messages"][-1]["content"], re.DOTALL)


def shorter(body: dict[str, Any]) -> Any:
    """The rule: the shorter answer is better; of equally long ones, none."""
    first, second = map(len, answers_in(body))
    return 200, completion("1" if first < second else "2" if second < first else "no")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_judging, "Teacher", partial(train_judging.Teacher, back_off=(0.0,)))


def new_run(home: Home, url: str, rows: list[dict[str, Any]] = PROMPTS, **options: Any) -> Run:
    train = tiny.write_rows(home.root / "train.jsonl", rows)
    objective = {"name": "rlaif", "endpoint": url, "model": "judge", "concurrency": 1, "max_tokens": 12, **options}
    fields = {
        "model": "tiny", "training_file": "train", "dtype": "float32", "threads": 1, "seed": 1, "n_epochs": 2,
        "batch_size": 4, "path": "plain", "tuner": {"name": "lora", "r": 4}, "learning_rate": 1e-2, "min_examples": 5,
    }  # fmt: skip
    made = check_parts(parse_spec({**fields, "objective": objective}), describe())
    return create_run(home, made, train_path=train)


def allow(monkeypatch: pytest.MonkeyPatch, server: TeacherServer) -> None:
    monkeypatch.setenv(outbound.VARIABLE, server.url)


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(run: Run) -> list[dict[str, Any]]:
    return [e.data for e in run.events() if e.type == "metrics"]


def test_sampled_pairs_are_labelled_by_the_rule_and_learned(tiny_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while sampling, then a judge that goes away after five questions: nothing is sampled or asked twice."""
    monkeypatch.setattr(candidates, "TOGETHER", 8)
    with teacher_server(lambda body: shorter(body) if len(server.seen) <= 5 else (503, None)) as server:
        allow(monkeypatch, server)
        run = new_run(tiny_home, server.url)
        with pytest.raises(Interrupted, match="answers were sampled"):
            attempt(run, tiny_home, stop=stop_after(16))
        sampled = run.folder / "answers" / "train-sampled.jsonl"
        first = sampled.read_bytes()
        assert first.count(b"\n") == 8 and not server.seen
        with open(sampled, "ab") as f:
            f.write(b'{"prompt": [{"ro')  # the power went while a line was written
        with pytest.raises(EndpointDown, match="resume the job later"):
            attempt(run, tiny_home, 2)
        assert sampled.read_bytes().startswith(first) and len(lines(sampled)) == N
        server.answer = shorter
        n = len(server.seen)
        attempt(run, tiny_home, 3)
        bodies = [json.dumps(b) for _, _, b in server.seen]
        assert len(set(bodies)) >= len(bodies) - (n - 5)  # only what failed was asked again
        again = new_run(tiny_home, server.url)
        attempt(again, tiny_home)
        assert len(server.seen) == len(bodies) and weights(again) == weights(run)
    rows = lines(answers_of(run, "train"))
    by_prompt = {json.dumps(s["prompt"]): s["answers"] for s in lines(sampled)}
    uneven = [a for a in by_prompt.values() if all(t.strip() for t in a) and len(a[0]) != len(a[1])]
    assert len(rows) == len(uneven) >= 5
    for row in rows:
        better, worse = (row[k][0]["content"] for k in ("preferred_output", "non_preferred_output"))
        assert sorted(by_prompt[json.dumps(row["input"]["messages"])]) == sorted([better, worse])
        assert len(better) < len(worse)
    said = next(e for e in run.events() if "judged" in e.data)
    assert f"judge judged {len(rows)} of {N} pairs of train.jsonl" in said.message
    assert abs(steps(run)[0]["train_loss"] - 0.6931) < 1e-3
    assert steps(run)[-1]["train_reward_margin"] > 0.05


def test_given_pairs_are_judged_anew_and_a_judge_of_places_is_refused(
    tiny_home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = tiny.pair_rows(12)
    with teacher_server(shorter) as server:
        allow(monkeypatch, server)
        run = new_run(tiny_home, server.url, pairs, principles="Be brief.")
        attempt(run, tiny_home)
        assert "Be brief." in server.seen[0][2]["messages"][0]["content"] and len(server.seen) == 24
        for row in lines(answers_of(run, "train")):
            better, worse = (row[k][0]["content"] for k in ("preferred_output", "non_preferred_output"))
            assert len(better) < len(worse)
        server.answer = lambda body: (200, completion("1"))
        biased = new_run(tiny_home, server.url, pairs, principles="Something else.")
        with pytest.raises(SpecError, match=r"judge gave a verdict on 0 pairs of train\.jsonl.*came first"):
            attempt(biased, tiny_home)
    assert any(e.level == "warn" and "More than half of the pairs are ties" in e.message for e in biased.events())
    with pytest.raises(SpecError, match="give its option 'model', too"):
        new_run(tiny_home, server.url, model=None)


@pytest.mark.slow
def test_a_model_of_this_machine_judges(tiny_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model names no number: it is asked both ways in the engine, gives ties, and none is no training."""
    told: list[Any] = []

    def generate(self: Any, asked: Any) -> dict[str, Any]:
        told.append(asked)
        first, second = map(len, answers_in({"messages": asked.messages}))
        text = "1" if first < second else "2" if len(told) > 4 else "neither"
        return {"choices": [{"text": text, "finish_reason": "stop"}], "usage": {"total_tokens": 5}}

    pairs = tiny.pair_rows(12)
    real = new_run(tiny_home, "", pairs, model=None, endpoint=None, judge="tiny", judge_tokens=3)
    with pytest.raises(SpecError, match=r"tiny gave a verdict on 0 pairs of train\.jsonl.*neither 1 nor 2|cut off"):
        attempt(real, tiny_home)
    monkeypatch.setattr(train_judging.Engine, "generate", generate)
    run = new_run(tiny_home, "", pairs, model=None, endpoint=None, judge="tiny", principles="Be brief.")
    attempt(run, tiny_home)
    assert (told[0].base, told[0].temperature, told[0].max_tokens) == ("tiny", 0.0, 512)
    rows = lines(answers_of(run, "train"))
    assert len(rows) >= 10
    for row in rows:
        better, worse = (row[k][0]["content"] for k in ("preferred_output", "non_preferred_output"))
        assert len(better) < len(worse)
