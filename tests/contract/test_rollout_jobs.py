"""Whole jobs that learn from their own answers: the reward rises, a crash anywhere changes nothing, what is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from job_kit import attempt, greedy, stop_after, weights
from safetensors.torch import load_file
from test_crash import Crash

import tiny
from teacher_kit import completion, teacher_server
from tunewright.core import outbound
from tunewright.core.errors import DataError, EndpointDown, Interrupted, SpecError, UserError
from tunewright.core.home import Home
from tunewright.core.run import Run, read_artefact
from tunewright.core.spec import check_parts, parse_spec
from tunewright.engine.engine import Engine
from tunewright.engine.request import RowsRequest, parse_request
from tunewright.engine.rows import RowModels
from tunewright.graders.base import Said, Sample, Seams, parse_grader
from tunewright.jobs.prepare import create_run
from tunewright.train import loop, rollouts
from tunewright.train.describe import describe
from tunewright.train.samples import Samples

HAS_AN_A = {
    "type": "string_check", "name": "has an a", "operation": "ilike",
    "input": "{{ sample.output_text }}", "reference": "{{ item.wanted }}",
}  # fmt: skip
NEVER = {**HAS_AN_A, "operation": "eq"}
ASKED = [{"role": "user", "content": "From 0 to 1: how good is {{ sample.output_text }}?"}]
JUDGE = {"type": "score_model", "name": "j", "model": "tiny", "input": ASKED}
ROWS, LONG, ANSWERS = 12, 8, 6


def rows(n: int = ROWS) -> list[dict[str, Any]]:
    """Prompts, each third one with an answer that is no part of it."""
    made = []
    for i, row in enumerate(tiny.sft_rows(n)):
        messages = row["messages"][:2] if i % 3 else row["messages"][:3]
        made.append({"messages": messages, "wanted": "a"})
    return made


def new_run(home: Home, objective: dict[str, Any] | None = None, data: Any = None, **spec: Any) -> Run:
    train = tiny.write_rows(home.root / "train.jsonl", rows() if data is None else data)
    valid = tiny.write_rows(home.root / "valid.jsonl", (rows() if data is None else data)[:3])
    asked = objective or {}
    sizes = {} if asked.get("name") == "ppo" else {"group_size": ANSWERS}
    part = {
        "name": "grpo", "grader": HAS_AN_A, "max_completion_tokens": LONG, **sizes, **asked
    }  # fmt: skip
    fields = {
        "model": "tiny", "training_file": "train", "dtype": "float32", "threads": 1, "seed": 1, "n_epochs": 2,
        "batch_size": 4, "learning_rate": 3e-3, "tuner": {"name": "lora", "r": 4}, "path": "plain",
        "objective": part,
    }  # fmt: skip
    made = check_parts(parse_spec({**fields, **spec}), describe())
    return create_run(home, made, train_path=train, validation_path=valid if "validation_file" in spec else None)


def steps(run: Run) -> list[dict[str, Any]]:
    return [e.data for e in run.events() if e.type == "metrics"]


def story(run: Run) -> list[tuple[Any, ...]]:
    keys = ("step", "train_loss", "train_mean_reward", "train_kl", "train_dead_share", "grad_norm")
    return [tuple(s.get(k) for k in keys) for s in steps(run)]


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["grpo", pytest.param("rloo", marks=pytest.mark.slow)])
def test_the_reward_rises_and_every_answer_is_kept(tiny_home: Home, name: str) -> None:
    data = [{**row, "wanted": "z"} for row in rows()]
    run = new_run(tiny_home, {"name": name}, data, n_epochs=6, learning_rate=3e-2, validation_file="valid")
    attempt(run, tiny_home)
    found = steps(run)
    first, last = found[0], found[-1]
    rewards = [s["train_mean_reward"] for s in found]
    assert len(found) == 18 and sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.4
    known = [s["train_kl"] for s in found if "train_kl" in s]
    assert known[0] == pytest.approx(0, abs=1e-9) and known[-1] > 0
    assert last["full_valid_mean_reward"] > 0.5
    assert 0 < last["train_completion_tokens_mean"] <= LONG and last["train_mean_parse_error"] == 0
    kept = lines(run)
    trained = [x for x in kept if x["role"] == "train"]
    assert len(trained) == 18 * 4 * ANSWERS and {x["role"] for x in kept} == {"train", "valid"}
    for s in found:
        own = [x for x in trained if x["step"] == s["step"]]
        assert sum(x["reward"] for x in own) / len(own) == pytest.approx(s["train_mean_reward"])
        assert {(x["row"], x["sample"]) for x in own} == {
            (r, i) for r in {x["row"] for x in own} for i in range(ANSWERS)
        }
    assert all(x["reward"] == float("z" in x["text"].lower()) for x in kept)
    assert all(len(x["tokens"]) == x["n_tokens"] <= LONG and x["prompt"].endswith("assistant\n") for x in kept)
    assert "train_mean_reward" in run.metrics_csv.read_text().splitlines()[0]
    events = [e for e in run.events() if e.type == "metrics"]
    assert events[0].message.startswith(f"Step 1/18 , train mean reward={first['train_mean_reward']:.2f}")


@pytest.mark.slow
def test_ppo_raises_the_reward_with_a_grader_and_its_head_stays_in_the_checkpoints(tiny_home: Home) -> None:
    run = new_run(tiny_home, {"name": "ppo"}, n_epochs=25, batch_size=12, learning_rate=1e-2)
    attempt(run, tiny_home)
    found = steps(run)
    rewards = [s["train_mean_reward"] for s in found]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15
    assert {"train_kl", "train_entropy", "train_clip_share", "train_value_loss"} <= set(found[-1])
    assert max(s["train_clip_share"] for s in found) > 0
    (checkpoint, *_) = sorted(run.checkpoints.iterdir(), reverse=True)
    saved = load_file(checkpoint / "tuner.safetensors")
    assert saved["value_head.linear.weight"].abs().max() > 0
    for path in (run.result, checkpoint / "artefact"):
        assert not any("value_head" in key for f in path.glob("*.safetensors") for key in load_file(f))


@pytest.mark.slow
def test_ppo_learns_from_a_reward_model_of_its_own(tiny_home: Home) -> None:
    """The rewards are what the reward model, asked by itself, says of the same conversations."""
    fields = {"model": "tiny", "training_file": "pairs", "dtype": "float32", "threads": 1, "seed": 1, "n_epochs": 1}
    pairs = tiny.write_rows(tiny_home.root / "pairs.jsonl", tiny.pair_rows(12))
    judge = create_run(
        tiny_home, check_parts(parse_spec({**fields, "objective": "reward"}), describe()), train_path=pairs
    )
    attempt(judge, tiny_home)
    name = read_artefact(judge.result).name
    run = new_run(tiny_home, {"name": "ppo", "grader": None, "reward_model": name}, n_epochs=1)
    attempt(run, tiny_home)
    prompts = {i: row["messages"][:2] for i, row in enumerate(rows(), 1)}
    models = RowModels(tiny_home, torch.float32, 1)
    for x in lines(run):
        messages = [*prompts[x["row"]], {"role": "assistant", "content": x["text"]}]
        asked = RowsRequest.model_validate({"artefact": str(judge.result), "rows": [{"messages": messages}]})
        assert x["reward"] == pytest.approx(models.judge(asked)["results"][0]["score"], rel=1e-4, abs=1e-5)
    lm = new_run(tiny_home, n_epochs=1)
    attempt(lm, tiny_home)
    for other in ("tiny", read_artefact(lm.result).name):
        with pytest.raises(SpecError, match=f"'{other}' is no reward model: it writes text"):
            new_run(tiny_home, {"name": "ppo", "grader": None, "reward_model": other})
    with pytest.raises(SpecError, match="writes no text: it has a head for whole rows"):
        new_run(tiny_home, {"grader": {**JUDGE, "model": name}})


@pytest.mark.slow
def test_a_model_of_this_machine_judges(tiny_home: Home) -> None:
    """A tuned model, in the engine inside the worker; asked by itself, about one answer after the other, it says the
    same. A random one says nothing that is a number, so its words are what an answer's `why` has."""
    tuned = new_run(tiny_home, n_epochs=1)
    attempt(tuned, tiny_home)
    spec = {**JUDGE, "model": tuned.job().name, "sampling_params": {"max_completions_tokens": 6}}
    run = new_run(tiny_home, {"grader": spec}, n_epochs=1)
    attempt(run, tiny_home)
    engine = Engine(tiny_home, dtype="float32", threads=1)

    def alone(messages: Any, *, model: str, max_completion_tokens: int) -> Said:
        own = {"messages": messages, "max_tokens": max_completion_tokens, "temperature": 0.0}
        done = engine.generate(parse_request({"artefact": str(tuned.result), **own}))
        return Said(done["choices"][0]["text"])

    with parse_grader(spec, seams=Seams(ask=alone)) as grader:
        for x in lines(run)[:: ANSWERS + 1]:
            found = grader.grade({}, Sample(x["text"]))
            assert x["errors"] == {"model_grader_parse_error": True} == found.errors and x["why"] == found.why
    assert len({x["why"] for x in lines(run)}) > 3


@pytest.mark.slow
def test_a_slow_judge_does_not_hold_up_whoever_stops_the_job(tiny_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while the judge thinks: nothing is committed, and the next attempt samples the same answers again."""
    released = threading.Event()

    def slow(body: Any) -> Any:
        released.wait(60)
        return 200, completion('{"result": 0.5}')

    with teacher_server(slow) as server:
        monkeypatch.setenv(outbound.VARIABLE, server.url)
        grader = {**JUDGE, "tunewright": {"endpoint": server.url}}
        run = new_run(tiny_home, {"grader": grader}, n_epochs=1)
        with pytest.raises(Interrupted, match="while the step's answers were graded"):
            attempt(run, tiny_home, 1, lambda: bool(server.seen))
        assert not released.is_set() and lines(run) == []
        asked = {body["messages"][-1]["content"] for _, _, body in server.seen}
        released.set()
        attempt(run, tiny_home, 2)
        assert asked <= {body["messages"][-1]["content"] for _, _, body in server.seen}
    assert {x["reward"] for x in lines(run)} == {0.5} and len(steps(run)) == 3


def test_the_training_model_answers_as_the_engine_with_its_own_copy(tiny_home: Home) -> None:
    """Before the first update: the same draws from the same weights, a group's prompt computed once or not."""
    run = new_run(tiny_home, n_epochs=1)
    attempt(run, tiny_home)
    engine = Engine(tiny_home, dtype="float32", threads=1)
    for x in [x for x in lines(run) if x["step"] == 1 and x["sample"] == 0]:
        own = [y for y in lines(run) if y["step"] == 1 and y["row"] == x["row"]]
        seed = rollouts.derive_seed("rollout", 1, 1, x["row"])
        asked = {"base": "tiny", "prompt": x["prompt"], "n": ANSWERS, "max_tokens": LONG, "seed": seed}
        said = engine.generate(parse_request({**asked, "temperature": 1.0}))
        assert [c["text"] for c in said["choices"]] == [y["text"] for y in own]


def test_without_a_signal_nothing_is_updated(tiny_home: Home) -> None:
    """Dead groups only: no gradient, no step of the optimizer, nothing that is not a number."""
    run = new_run(tiny_home, {"grader": NEVER}, n_epochs=1)
    attempt(run, tiny_home)
    assert [(s["train_dead_share"], s["train_mean_reward"], s["grad_norm"]) for s in steps(run)] == [
        (1.0, 0.0, 0.0)
    ] * 3
    assert all(s["train_loss"] is None for s in steps(run))
    base, prompt = new_run(tiny_home, n_epochs=1), [5, 6, 7]
    attempt(base, tiny_home)
    engine = Engine(tiny_home, dtype="float32", threads=1)
    asked = {"base": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 0.0}
    log: list[dict[str, Any]] = []
    engine.add_request(parse_request(asked), log.append)
    while engine.step():
        pass
    assert greedy(tiny_home, run, prompt, 6) == [e["token_id"] for e in log if e["type"] == "token"]
    assert weights(run) != weights(base)


PLACES: dict[str, tuple[Any, str]] = {
    "sampling": (Engine, "step"),
    "committed": (Samples, "append"),
    "graded": (rollouts, "figures"),
    "training": (loop, "step_loss"),
}


def crash_in(what: str, at: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Crash at the `at`-th call of a place, before (or, of `committed`, after) it has done its work."""
    calls = iter(range(1, 10**6))

    def arm(patch: pytest.MonkeyPatch) -> None:
        place, name = PLACES[what]
        real = getattr(place, name)

        def visited(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == at:
                if what == "committed":
                    real(*args, **kwargs)
                raise Crash(what)
            return real(*args, **kwargs)

        patch.setattr(place, name, visited)

    return arm


CRASHES = (("sampling", 20), ("committed", 2), ("graded", 3), ("training", 2))
KINDS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "rloo": {"name": "rloo"},
    "several updates": {"updates": 2},
    "ppo": {"name": "ppo", "updates": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_crashed_in_and_after_a_rollout_and_continued_is_uninterrupted(
    tiny_home: Home, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden, crashed = (new_run(tiny_home, KINDS[kind], save_every_steps=2) for _ in range(2))
    attempt(golden, tiny_home)
    number = 1
    with pytest.raises(Interrupted, match="while the model answered"):
        attempt(crashed, tiny_home, number, stop_after(10))
    for number, (what, at) in enumerate(CRASHES, 2):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            crash_in(what, at)(patch)
            attempt(crashed, tiny_home, number)
    with pytest.raises(Interrupted):
        attempt(crashed, tiny_home, number + 1, stop_after(1))
    attempt(crashed, tiny_home, number + 2)
    assert len(story(golden)) == 6
    assert story(crashed) == story(golden)
    assert weights(crashed) == weights(golden)
    texts = [(x["step"], x["row"], x["sample"], x["tokens"], x["reward"], x["advantage"]) for x in lines(golden)]
    assert [
        (x["step"], x["row"], x["sample"], x["tokens"], x["reward"], x["advantage"]) for x in lines(crashed)
    ] == texts


@pytest.mark.slow
def test_a_judge_that_is_down_pauses_the_job_and_nothing_is_lost(
    tiny_home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden, paused = (new_run(tiny_home) for _ in range(2))
    attempt(golden, tiny_home)
    with monkeypatch.context() as patch, pytest.raises(EndpointDown, match="does not answer"):
        grade, calls = rollouts.Grader.grade, iter(range(10**6))

        def sometimes(*args: Any) -> Any:
            if next(calls) > 2 * 4 * ANSWERS:
                raise EndpointDown("http://judge does not answer")
            return grade(*args)

        patch.setattr(rollouts.Grader, "grade", sometimes)
        attempt(paused, tiny_home, 1)
    assert [p.name for p in sorted(paused.checkpoints.iterdir())] == ["step-000002"]
    attempt(paused, tiny_home, 2)
    assert story(paused) == story(golden) and weights(paused) == weights(golden)


def test_a_torn_block_is_cut_off_and_an_older_one_of_other_weights_not_read(tmp_path: Path) -> None:
    def line(step: int, rollbacks: int = 0, role: str = "train") -> dict[str, Any]:
        return {"step": step, "role": role, "rollbacks": rollbacks, "text": "é"}

    samples = Samples(tmp_path)
    samples.append([line(1), line(1)])
    samples.append([line(1, role="valid")])
    samples.append([line(2), line(2)])
    whole = samples.path.read_bytes()
    for cut in (1, 30, len(whole.splitlines(keepends=True)[-1])):
        samples.path.write_bytes(whole[:-cut])
        again = Samples(tmp_path)
        assert again.of_step(2, 0) is None and [x["place"] for x in again.of_step(1, 0) or ()] == [0, 1]
        assert again.path.read_bytes() == whole[: len(again.path.read_bytes())] and again.of_step(1, 1) is None
    again.append([line(2, rollbacks=1)])
    assert Samples(tmp_path).of_step(2, 0) is None and len(Samples(tmp_path).of_step(2, 1) or ()) == 1


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a field that no row has": (
        {"grader": {**HAS_AN_A, "reference": "{{ item.wnated }}"}},
        {},
        "no row has 'wnated'.*Did you mean 'wanted'",
    ),
    "two judges of this machine": (
        {
            "grader": {
                "type": "multi",
                "name": "m",
                "graders": {"a": JUDGE, "b": {**JUDGE, "model": "tiny-2"}},
                "calculate_output": "a + b",
            }
        },
        {},
        "names 2: grader 'tiny', grader 'tiny-2'. Use one of them for all, or give a judge an endpoint",
    ),
    "a judge that is not there": ({"grader": {**JUDGE, "model": "tinny"}}, {}, "Did you mean 'tiny'"),
    "an unknown grader": ({"grader": {**HAS_AN_A, "type": "strong_check"}}, {}, "Did you mean 'string_check'"),
    "a soft prompt": ({}, {"tuner": {"name": "prompt", "virtual_tokens": 4}}, "soft prompt"),
    "chosen by the data": ({}, {"tuner": "fishmask"}, "given answers"),
    "no room for a prompt": ({"max_completion_tokens": 505}, {}, "1 to 504"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_with_one_error(tiny_home: Home, case: str) -> None:
    objective, spec, text = REFUSED[case]
    with pytest.raises(UserError, match=text):
        attempt(new_run(tiny_home, objective, **spec), tiny_home)


def test_a_grader_must_be_given(tiny_home: Home) -> None:
    with pytest.raises(SpecError, match="needs its option 'grader'"):
        new_run(tiny_home, {"grader": None})
    with pytest.raises(SpecError, match=r"needs one of its options 'grader'.*'reward_model'"):
        new_run(tiny_home, {"name": "ppo", "grader": None})


def test_rows_without_a_prompt_are_refused(tiny_home: Home) -> None:
    data = [*rows(11), {"messages": [{"role": "assistant", "content": "Hello"}]}]
    with pytest.raises(DataError, match="Example 12 has no message to answer"):
        attempt(new_run(tiny_home, data=data), tiny_home)
