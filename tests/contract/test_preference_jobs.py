"""Whole jobs over preferences: where they begin, that they raise the margin, resume exactly and are served."""

from __future__ import annotations

import csv
import math
from typing import Any

import pytest
from job_kit import attempt, checked, greedy, stop_after, weights
from parts import OPTIONS
from test_crash import Crash
from test_crash import points as crashes

import tiny
from tunewright.core.errors import DataError, Interrupted
from tunewright.core.home import Home
from tunewright.core.run import Run, read_artefact
from tunewright.jobs.loggers.base import points
from tunewright.jobs.prepare import create_run
from tunewright.objectives import OBJECTIVES
from tunewright.tuners import TUNERS

CARDS = {name: OBJECTIVES.load(name).card for name in OBJECTIVES}
OVER_PAIRS = [n for n, card in CARDS.items() if card.head == "lm" and set(card.shapes) & {"preference", "unpaired"}]
NAMES = [n for n in OVER_PAIRS if not CARDS[n].asks]  # test_rlaif_jobs.py has the one that asks a judge first
ROWS = 18
LN_2 = math.log(2)


def new_run(home: Home, objective: Any, rows: list[dict[str, Any]] | None = None, **spec: Any) -> Run:
    """A job over pairs (or `rows`), validated on six others."""
    rows = tiny.pair_rows(ROWS + 6) if rows is None else rows
    train = tiny.write_rows(home.root / "train.jsonl", rows[:ROWS])
    valid = tiny.write_rows(home.root / "valid.jsonl", rows[ROWS:])
    fields = {
        "model": "tiny", "training_file": str(train), "dtype": "float32", "threads": 1, "seed": 1,
        "n_epochs": 2, "batch_size": 5, "objective": objective,
    }  # fmt: skip
    more = {"validation_file": str(valid)} if len(rows) > ROWS else {}
    made = checked({**fields, **more, **spec})
    return create_run(home, made, train_path=train, validation_path=valid if more else None)


def steps(run: Run) -> list[dict[str, Any]]:
    return [e.data for e in run.events() if e.type == "metrics"]


def story(run: Run) -> list[tuple[Any, ...]]:
    keys = ("step", "train_loss", "train_reward_margin", "grad_norm", "full_valid_loss", "full_valid_reward_margin")
    return [tuple(s.get(k) for k in keys) for s in steps(run)]


@pytest.mark.parametrize("name", [n if n == "dpo" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_every_objective_raises_the_margin_on_other_rows(tiny_home: Home, name: str) -> None:
    run = new_run(tiny_home, name, n_epochs=4)
    attempt(run, tiny_home)
    first, *_, last = steps(run)
    if name == "dpo":
        assert first["train_loss"] == pytest.approx(LN_2, abs=1e-12) and first["train_reward_margin"] == 0.0
    assert last["full_valid_reward_margin"] > first["train_reward_margin"]
    losses = [s["train_loss"] for s in steps(run)]
    assert sum(losses[-4:]) < sum(losses[:4])
    margins = [s["train_chosen_reward"] - s["train_rejected_reward"] for s in steps(run)]
    assert margins == pytest.approx([s["train_reward_margin"] for s in steps(run)], abs=1e-5)
    assert 0 <= last["full_valid_reward_accuracy"] <= 1 if name != "kto" else "train_kl" in last
    assert all(s["train_chosen_logp"] < 0 > s["train_rejected_logp"] for s in steps(run))


@pytest.mark.slow
def test_kto_of_marked_answers(tiny_home: Home) -> None:
    run = new_run(tiny_home, "kto", tiny.marked_rows(ROWS + 6), n_epochs=4)
    attempt(run, tiny_home)
    first, *_, last = steps(run)
    assert first["train_loss"] == 0.5 and first["train_reward_margin"] == 0.0
    assert last["full_valid_reward_margin"] > 0 and last["full_valid_loss"] < 0.5


SETTINGS: dict[str, dict[str, Any]] = {
    "an adapter": {},
    "in bfloat16": {"dtype": "bfloat16"},
    "on the plain modules": {"path": "plain"},
    "dropout": {"tuner": {"name": "lora", "dropout": 0.2}},
    "all weights": {"tuner": "full"},
    "some weights": {"tuner": {"name": "last_layers", "layers": 1}},
    "chosen by the data": {"tuner": {"name": "fishmask", "k": 500, "examples": 4}},
}


NIGHTLY = ("on the plain modules", "dropout", "some weights", "chosen by the data")


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.nightly) if c in NIGHTLY else c for c in SETTINGS])
def test_dpo_begins_at_ln_2_and_margin_0_exactly(tiny_home: Home, case: str) -> None:
    """From the base and, with the same tuner, from what that left; there dropout moves what the reference has not."""
    from_base = new_run(tiny_home, "dpo", tiny.pair_rows(ROWS), n_epochs=1, **SETTINGS[case])
    attempt(from_base, tiny_home)
    name = read_artefact(from_base.result).name
    again = new_run(tiny_home, "dpo", tiny.pair_rows(ROWS), n_epochs=1, **SETTINGS[case], model=name)
    attempt(again, tiny_home)
    for run in (from_base, *([again] if case != "dropout" else [])):
        first, second, *_ = steps(run)
        assert first["train_loss"] == pytest.approx(LN_2, abs=1e-12)
        assert first["train_reward_margin"] == first["train_chosen_reward"] == first["train_rejected_reward"] == 0.0
        assert second["train_reward_margin"] != 0.0
    assert (again.plan() or {})["base"]["loss"] == pytest.approx(LN_2, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        ("dpo", {}),
        ("dpo", {"tuner": "full"}),
        pytest.param(("dpo", {"path": "plain", "tuner": {"name": "lora", "dropout": 0.1}}), marks=pytest.mark.nightly),
        ("kto", {}),
        pytest.param(("orpo", {}), marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_resume_is_exact(tiny_home: Home, case: tuple[str, dict[str, Any]]) -> None:
    name, spec = case
    golden, stopped = (new_run(tiny_home, name, save_every_steps=3, **spec) for _ in range(2))
    attempt(golden, tiny_home)
    with pytest.raises(Interrupted):
        attempt(stopped, tiny_home, 1, stop_after(9))
    assert 0 < len(story(stopped)) < 8
    attempt(stopped, tiny_home, 2)
    assert story(stopped) == story(golden) and len(story(golden)) == 8
    assert weights(stopped) == weights(golden)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("tuner", list(TUNERS))
def test_every_tuner_raises_the_margin(tiny_home: Home, tuner: str) -> None:
    """A tuner that is the base at first begins at ln 2."""
    options = OPTIONS.get(tuner, {})
    run = new_run(tiny_home, "dpo", tuner={"name": tuner, **options}, n_epochs=4, learning_rate_multiplier=5.0)
    attempt(run, tiny_home)
    first, *_, last = steps(run)
    if TUNERS.load(tuner).card.identity_at_start:
        assert first["train_loss"] == pytest.approx(LN_2, abs=1e-6)
    assert last["full_valid_reward_margin"] > first["train_reward_margin"]


@pytest.mark.slow
def test_continued_from_an_adapter_resume_is_exact_and_the_reference_is_the_start(tiny_home: Home) -> None:
    sft = new_run(tiny_home, "sft", tiny.sft_rows(ROWS), n_epochs=1)
    attempt(sft, tiny_home)
    name = read_artefact(sft.result).name
    golden, stopped = (new_run(tiny_home, "dpo", model=name) for _ in range(2))
    attempt(golden, tiny_home)
    assert steps(golden)[0]["train_loss"] == pytest.approx(LN_2, abs=1e-12)
    with pytest.raises(Interrupted):
        attempt(stopped, tiny_home, 1, stop_after(7))
    attempt(stopped, tiny_home, 2)
    assert story(stopped) == story(golden)
    assert weights(stopped) == weights(golden)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(("kto", "lora"), marks=pytest.mark.nightly),
        pytest.param(("dpo", "full"), marks=pytest.mark.nightly),
        pytest.param(("dpo", "fishmask"), marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_crashed_everywhere_and_continued_is_uninterrupted(
    tiny_home: Home, case: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, tuner = case
    spec: dict[str, Any] = {"micro_batch_tokens": 64, "save_every_steps": 3, "path": "plain", "tuner": tuner}
    golden, crashed = (new_run(tiny_home, name, tiny.pair_rows(ROWS), **spec) for _ in range(2))
    attempt(golden, tiny_home)
    number = 0
    for number, point in enumerate(crashes(tuner), 1):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            point.arm(patch, TUNERS.load(tuner))
            attempt(crashed, tiny_home, number)
    attempt(crashed, tiny_home, number + 1)
    assert len(story(golden)) == 8
    assert story(crashed) == story(golden)
    assert weights(crashed) == weights(golden)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("name", ["dpo", "kto", "orpo"])
@pytest.mark.parametrize("path", ["auto", "plain"])
def test_any_cut_and_any_path_of_a_step_is_the_step(tiny_home: Home, name: str, path: str) -> None:
    whole, cut = new_run(tiny_home, name), new_run(tiny_home, name, micro_batch_tokens=1, path=path)
    for run in (whole, cut):
        attempt(run, tiny_home)
    for a, b in zip(steps(whole), steps(cut), strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
        assert b["train_reward_margin"] == pytest.approx(a["train_reward_margin"], abs=2e-4)


@pytest.mark.slow
def test_what_a_dpo_job_leaves(tiny_home: Home) -> None:
    """The result answers otherwise than the base, and its table has OpenAI's five columns and those of pairs."""
    run = new_run(tiny_home, {"name": "dpo", "beta": 0.05}, n_epochs=3, learning_rate=3e-3)
    attempt(run, tiny_home)
    prompt = [5, 6, 7]
    assert len(greedy(tiny_home, run, prompt, 6)) == 6
    table = list(csv.DictReader(run.metrics_csv.open()))
    assert list(table[0])[:5] == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert {"train_reward_margin", "train_reward_accuracy", "valid_reward_margin"} <= set(table[0])
    assert float(table[-1]["train_reward_margin"]) == steps(run)[-1]["train_reward_margin"]
    assert points(run)[-1].values["train_reward_margin"] == steps(run)[-1]["train_reward_margin"]
    plan = run.plan() or {}
    assert plan["peak_memory_bytes"] > 0 and plan["n_tokens"] > 0


def changed(rows: list[dict[str, Any]], i: int, **fields: Any) -> list[dict[str, Any]]:
    return [{**row, **fields} if k == i else row for k, row in enumerate(rows)]


REFUSED: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "chat rows": (
        "dpo",
        tiny.sft_rows(12),
        r"fine-tune-chat format.*method=dpo.*such rows: answers, .*, sft\.",
    ),
    "pairs for sft": ("sft", tiny.pair_rows(12), r"fine-tune-preference.*method=supervised.*rows: .*dpo.*orpo.*simpo"),
    "marks for dpo": ("dpo", tiny.marked_rows(12), r"marked good or bad.*such rows: kto\."),
    "equal answers": (
        "dpo",
        changed(tiny.pair_rows(12), 4, non_preferred_output=tiny.pair_rows(5)[4]["preferred_output"]),
        "Example 5 has the same text as preferred and as rejected",
    ),
    "an empty completion": (
        "kto",
        changed(tiny.marked_rows(12), 2, completion=" "),
        "Example 3 has an empty completion",
    ),
    "no mark": (
        "kto",
        changed(tiny.marked_rows(12), 2, label="maybe"),
        "Example 3 has the label 'maybe', which is neither true nor false",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_do_not_fit_are_refused_with_one_error(tiny_home: Home, case: str) -> None:
    name, rows, text = REFUSED[case]
    with pytest.raises(DataError, match=text):
        attempt(new_run(tiny_home, name, rows), tiny_home)
