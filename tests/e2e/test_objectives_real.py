"""Objectives on real data and the real model. TUNEWRIGHT_DATA: a folder with `c4_text.jsonl` (rows with `text`) and
`hh_harmless.jsonl` (rows with `chosen` and `rejected`, "Human: … Assistant: …"); without them these are skipped."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

import tiny
from tunewright.core.events import EventWriter
from tunewright.core.home import Home
from tunewright.core.run import Run
from tunewright.core.spec import check_parts, parse_spec
from tunewright.data.demo import HELDOUT, TRAIN
from tunewright.jobs.prepare import create_run
from tunewright.metrics.intervals import wilson
from tunewright.train.describe import describe
from tunewright.train.run import run_job

pytestmark = [pytest.mark.nightly, pytest.mark.slow, pytest.mark.real_model]
NAME = "smollm2-135m-instruct"
Rows = list[dict[str, Any]]


def given(name: str) -> Rows:
    path = Path(os.environ.get("TUNEWRIGHT_DATA", "/nowhere")) / name
    if not path.is_file():
        pytest.skip(f"TUNEWRIGHT_DATA has no {name}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def trained(home: Home, rows: Rows, held_out: Rows, **spec: Any) -> tuple[Run, dict[str, Any]]:
    """The run and the metrics of its last step."""
    train, valid = (tiny.write_rows(home.root / f"{n}.jsonl", r) for n, r in (("train", rows), ("valid", held_out)))
    fields = {"model": NAME, "training_file": "t", "validation_file": "v", "seed": 1, "n_epochs": 1, **spec}
    run = create_run(home, check_parts(parse_spec(fields), describe()), train_path=train, validation_path=valid)
    events = EventWriter(run.attempt(1) / "events.jsonl", 1)
    run_job(run, home, events, lambda: False)
    events.close()
    return run, [e.data for e in run.events() if e.type == "metrics"][-1]


@pytest.mark.parametrize("documents", ["separate", "joined"])
def test_pretraining_lowers_held_out_perplexity(home: Home, documents: str) -> None:
    rows = given("c4_text.jsonl")
    objective = {"name": "pretrain", "documents": documents}
    options = {"objective": objective, "max_length": 512, "batch_size": 4, "eval_every": 1000}
    run, said = trained(home, rows[:160], rows[160:], **options)
    assert said["full_valid_loss"] < run.plan()["base"]["loss"]


def turns(text: str) -> Rows:
    """The messages of a dialogue of "Human:" and "Assistant:"."""
    parts = re.split(r"\n\n(Human|Assistant): ?", text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": c} for r, c in zip(parts[::2], parts[1::2], strict=True)]


def pairs(rows: Rows) -> Rows:
    found = []
    for row in rows:
        good, bad = turns(row["chosen"]), turns(row["rejected"])
        usable = good[:-1] == bad[:-1] and good[-1] != bad[-1] and all(m["content"].strip() for m in (*good, *bad))
        if usable and good[-1]["role"] == bad[-1]["role"] == "assistant":
            asked = {"input": {"messages": good[:-1]}}
            found.append({**asked, "preferred_output": good[-1:], "non_preferred_output": bad[-1:]})
    return found


def test_a_reward_model_orders_held_out_pairs(home: Home) -> None:
    rows = pairs(given("hh_harmless.jsonl"))
    held_out = rows[-400:]
    options = {"head": "reward", "max_length": 384, "overlong": "drop", "eval_every": 10_000, "batch_size": 16}
    run, said = trained(home, rows[:-400], held_out, **options)
    n = run.plan()["n_valid_rows"]
    assert n >= 350 and wilson(round(said["full_valid_pair_accuracy"] * n), n).low > 0.52


def test_a_tuned_teacher_beats_the_rows_alone(home: Home) -> None:
    """The student is the first half of the model's layers; teacher and rows are the demo's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunewright.models.loader import materialise

    rows, held_out = ([json.loads(x) for x in f.read_text(encoding="utf-8").splitlines()] for f in (TRAIN, HELDOUT))
    teacher, _ = trained(home, rows, held_out, n_epochs=2)
    folder = materialise(NAME, home)
    net: Any = AutoModelForCausalLM.from_pretrained(folder)
    net.model.layers = net.model.layers[:15]
    net.config.num_hidden_layers = 15
    net.save_pretrained(home.models / "half")
    AutoTokenizer.from_pretrained(folder).save_pretrained(home.models / "half")
    both = {}
    for objective in ("sft", {"name": "distill", "teacher": teacher.job().name, "hard": 0.5}):
        _, said = trained(home, rows, held_out, model="half", objective=objective, tuner="full", n_epochs=2)
        name = objective if isinstance(objective, str) else "distill"
        both[name] = said["full_valid_mean_token_accuracy"]
    assert both["distill"] > both["sft"], both
