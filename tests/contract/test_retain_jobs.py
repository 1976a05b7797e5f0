"""Whole jobs that must not forget, or learn from several files: in the events, resumed exactly, cut anyhow, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from job_kit import attempt, checked, stop_after, weights

import tiny
from tunewright.core.durable import read_json
from tunewright.core.errors import DataError, Interrupted, SpecError
from tunewright.core.home import Home
from tunewright.core.run import Run
from tunewright.core.spec import extra_files
from tunewright.jobs.prepare import create_run

ALL = [
    {"name": "replay", "file": "old.jsonl", "share": 0.5},
    {"name": "ewc", "file": "old.jsonl", "examples": 4, "coefficient": 1000},
    {"name": "l2sp"},
    {"name": "kl"},
    {"name": "kl", "file": "texts.jsonl", "share": 0.2, "kind": "reverse"},
]
TERMS = ("replay", "ewc", "l2sp", "kl", "kl_2")


@pytest.fixture
def base(tiny_home: Home) -> Home:
    rows = tiny.sft_rows(40)
    tiny.write_rows(tiny_home.root / "train.jsonl", rows[:18])
    tiny.write_rows(tiny_home.root / "old.jsonl", rows[20:27])
    tiny.write_rows(tiny_home.root / "more.jsonl", rows[30:36])
    tiny.write_rows(
        tiny_home.root / "texts.jsonl", [{"text": f"The quick fox {i} jumps over the dog."} for i in range(5)]
    )
    return tiny_home


def new_run(home: Home, **spec: Any) -> Run:
    fields = {
        "model": "tiny", "training_file": "train.jsonl", "dtype": "float32", "threads": 1, "seed": 1, "path": "plain",
        "n_epochs": 2, "batch_size": 5, "tuner": {"name": "lora", "r": 4}, "retain": ALL,
    }  # fmt: skip
    made = checked({**fields, **spec})
    more = {role: home.root / file for role, file in extra_files(made).items()}
    return create_run(home, made, train_path=home.root / "train.jsonl", more=more)


def story(run: Run) -> list[tuple[Any, ...]]:
    keys = ("step", "train_loss", "grad_norm", *(f"retain_{t}" for t in TERMS))
    return [tuple(e.data.get(k) for k in keys) for e in run.events() if e.type == "metrics"]


def test_every_term_is_in_the_events(base: Home) -> None:
    """Nothing is far at the start, something later; the plan has the files' shares."""
    run = new_run(base, n_epochs=1, mix={"files": [{"file": "more.jsonl"}], "weight": 2})
    assert attempt(run, base)["status"] == "succeeded"
    first, last = story(run)[0], story(run)[-1]
    assert (first[0], last[0]) == (1, 5) and all(isinstance(v, float) for v in (*first[1:], *last[1:]))
    assert first[4:] == pytest.approx((0.0, 0.0, 0.0, 0.0), abs=1e-6)
    assert all(v > 0 for v in last[3:])
    plan = run.plan()
    assert plan is not None and plan["mix"] == [[18, 16], [6, 8]]


@pytest.mark.slow
@pytest.mark.parametrize("tuner", [{"name": "lora", "r": 4}, pytest.param("full", marks=pytest.mark.nightly)])
def test_a_job_with_all_methods_resumes_exactly(base: Home, tuner: Any) -> None:
    """Stopped while the Fisher is measured (4 rows), then in the middle; beside a mix of two files."""
    mix = {"files": [{"file": "more.jsonl"}], "weight": 2}
    golden, stopped = new_run(base, tuner=tuner, mix=mix), new_run(base, tuner=tuner, mix=mix)
    assert attempt(golden, base)["status"] == "succeeded"
    number = 1
    for asked in (3, 4 + 9):
        with pytest.raises(Interrupted):
            attempt(stopped, base, number, stop_after(asked))
        number += 1
    assert len(story(stopped)) in range(2, 9)
    attempt(stopped, base, number)
    assert story(stopped) == story(golden)
    assert weights(stopped) == weights(golden)
    assert story(golden)[-1][0] == 10


@pytest.mark.slow
@pytest.mark.nightly
def test_any_cut_of_a_step_is_the_step(base: Home) -> None:
    whole, cut = new_run(base), new_run(base, micro_batch_tokens=1)
    for run in (whole, cut):
        attempt(run, base)
    for a, b in zip(story(whole), story(cut), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["lora", *(pytest.param(t, marks=pytest.mark.nightly) for t in ("full", "bitfit"))])
def test_a_job_that_goes_on_holds_to_where_it_started(base: Home, tuner: str) -> None:
    """The reference is the policy at step 0: the parent's model, not the base below it."""
    options: Any = {"name": "bitfit", "add_biases": True} if tuner == "bitfit" else tuner
    first = new_run(base, tuner=options, retain=[], learning_rate_multiplier=30)
    attempt(first, base)
    again = new_run(base, tuner=options, model=first.job().name, retain=["kl"], n_epochs=1)
    attempt(again, base)
    told = [e.data["retain_kl"] for e in again.events() if e.type == "metrics"]
    assert told[0] == pytest.approx(0, abs=1e-6) and told[-1] > 1e-6
    assert story(again)[0][1] < story(first)[0][1] - 0.05


@pytest.mark.slow
def test_classes_of_all_mixed_files_and_retained_rows_with_labels(home: Home) -> None:
    tiny.build_reader(home.models / "tiny", "bert")
    rows = tiny.label_rows(30)
    tiny.write_rows(home.root / "train.jsonl", [r for r in rows if r["label"] != "red"])
    tiny.write_rows(home.root / "more.jsonl", [r for r in rows if r["label"] == "red"])
    tiny.write_rows(home.root / "old.jsonl", rows[:6])
    retain = [{"name": n, "file": "old.jsonl"} for n in ("replay", "ewc", "kl")]
    run = new_run(home, head="classify", mix=["more.jsonl"], retain=retain, tuner="full")
    end = attempt(run, home)
    assert end["status"] == "succeeded"
    assert {"red", "green", "blue"} == set(read_json(run.folder / "labels.json")["labels"])
    last = [e.data for e in run.events() if e.type == "metrics"][-1]
    assert all(last[f"retain_{t}"] > 0 for t in ("replay", "ewc", "kl"))


@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["lora", pytest.param("full", marks=pytest.mark.nightly)])
def test_the_fast_path_gives_the_same_terms(tuner: str, kernels: Any, tmp_path: Path) -> None:
    """Penalties act on parameters; replay and KL ask for token_stats and divergence only."""
    tiny_home = Home(tmp_path / "fast").ensure()
    tiny.install_tiny_model(tiny_home.root, "tiny", built=tiny.build_tiny_model(tmp_path / "m", **tiny.TILED))
    for name, n in (("train", 18), ("old", 7)):
        tiny.write_rows(tiny_home.root / f"{name}.jsonl", tiny.sft_rows(n))
    retain = [m for m in ALL if m.get("file") != "texts.jsonl"]
    told = []
    for path in ("auto", "plain"):
        run = new_run(tiny_home, retain=retain, path=path, dtype="bfloat16", tuner=tuner)
        attempt(run, tiny_home)
        told.append([row[3:7] for row in story(run)])
        plan = run.plan()
        assert plan is not None and plan["path"] == {"auto": "fast"}.get(path, path)
    for a, b in zip(*told, strict=True):
        assert a == pytest.approx(b, rel=0.2, abs=2e-3)


@pytest.mark.slow
@pytest.mark.nightly
def test_an_encoder_decoder(home: Home) -> None:
    tiny.build_reader(home.models / "tiny", "t5")
    for name, n in (("train", 18), ("old", 6)):
        rows = [{"prompt": r["text"], "completion": r["label"]} for r in tiny.label_rows(n)]
        tiny.write_rows(home.root / f"{name}.jsonl", rows)
    retain = [{"name": n, "file": "old.jsonl"} for n in ("replay", "ewc", "kl")]
    run = new_run(home, retain=[*retain, "l2sp"])
    assert attempt(run, home)["status"] == "succeeded"
    assert all(v > 0 for v in story(run)[-1][3:7])


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"retain": "replay"}, SpecError, "'replay' needs rows of what must not be forgotten; give its option 'file'"),
        ({"retain": "replai"}, SpecError, "there is no retain 'replai'.*did you mean 'replay'"),
        ({"retain": {"name": "ewc", "file": "old.jsonl", "lambda": 3}}, SpecError, "no option 'lambda'.*coefficient"),
        ({"retain": {"name": "l2sp", "coefficient": -1}}, SpecError, "option 'coefficient'"),
    ],
)
def test_wrong_fields_are_refused_before_anything_is_read(base: Home, fields: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        new_run(base, **fields)


def test_rows_that_cannot_be_learned_are_refused(base: Home) -> None:
    tiny.write_rows(base.root / "old.jsonl", [{"text": "a", "label": "b"}])
    with pytest.raises(DataError, match="retained file"):
        attempt(new_run(base, retain={"name": "replay", "file": "old.jsonl"}), base)
