"""Whole jobs that learn from another model's distributions: the loss by transformers, resumed exactly, refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from job_kit import attempt, checked, stop_after, weights
from transformers import AutoModelForCausalLM

import tiny
from tunewright.core.errors import Interrupted, SpecError
from tunewright.core.home import Home
from tunewright.core.run import Run
from tunewright.data.rendered import StoredGroups
from tunewright.jobs.prepare import create_run

TEACHER = "wise"


@pytest.fixture
def home_with_teacher(tiny_home: Home) -> Home:
    """`wise` has the tiny model's tokenizer, other weights and another width."""
    tiny.build_tiny_model(tiny_home.models / TEACHER, seed=1, hidden_size=96, num_hidden_layers=1)
    return tiny_home


def new_run(home: Home, **spec: Any) -> Run:
    train = tiny.write_rows(home.root / "train.jsonl", tiny.sft_rows(16))
    valid = tiny.write_rows(home.root / "valid.jsonl", tiny.sft_rows(20)[16:])
    fields = {
        "model": "tiny", "training_file": "train", "validation_file": "valid", "dtype": "float32", "threads": 1,
        "seed": 1, "n_epochs": 2, "batch_size": 4, "path": "plain", "tuner": {"name": "lora", "r": 4},
        "objective": {"name": "distill", "teacher": TEACHER}, "learning_rate": 1e-2,
    }  # fmt: skip
    made = checked({**fields, **spec})
    return create_run(home, made, train_path=train, validation_path=valid)


def divergence(home: Home, run: Run, student: str, kind: str) -> float:
    """The mean over supervised tokens of the validation rows, from both models' own logits."""
    nets = [AutoModelForCausalLM.from_pretrained(home.models / name).eval() for name in (student, TEACHER)]
    total, n = 0.0, 0.0
    for group in StoredGroups(run.folder / "rendered" / "validation"):
        for e in group.examples:
            with torch.no_grad():
                q, p = (net(torch.tensor([e.ids])).logits[0, :-1].double().log_softmax(-1) for net in nets)
            a, b = (p, q) if kind == "forward" else (q, p)
            w = torch.tensor(e.weights[1:], dtype=torch.float64)
            total += float(((a.exp() * (a - b)).sum(-1) * w).sum())
            n += float(w.sum())
    return total / n


def test_the_student_comes_nearer_and_resumes_exactly(home_with_teacher: Home) -> None:
    home = home_with_teacher
    run = new_run(home)
    stopped = Run(run.folder.with_name("again"))
    shutil.copytree(run.folder, stopped.folder)
    with pytest.raises(Interrupted):
        attempt(stopped, home, 1, stop_after(3))
    attempt(stopped, home, 2)
    attempt(run, home)
    assert weights(run) == weights(stopped)
    base = run.plan()["base"]["loss"]
    assert base == pytest.approx(divergence(home, run, "tiny", "forward"), rel=1e-4)
    said = [e.data for e in run.events() if e.type == "metrics"][-1]
    assert said["full_valid_divergence"] == pytest.approx(said["full_valid_loss"])
    assert said["full_valid_loss"] < 0.9 * base
    assert said["train_perplexity"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["lora", pytest.param("full", marks=pytest.mark.nightly)])
def test_every_kind_and_a_tuned_teacher(home_with_teacher: Home, tuner: str) -> None:
    """A teacher that is an `ft:` model comes along in the run folder: deleting it afterwards changes nothing."""
    home = home_with_teacher
    first = new_run(home, model=TEACHER, objective="sft", tuner=tuner, n_epochs=1)
    attempt(first, home)
    options = {"name": "distill", "teacher": first.job().name, "kind": "jsd", "beta": 0.3, "temperature": 2.0}
    run = new_run(home, objective={**options, "hard": 0.25}, tuner=tuner, learning_rate=5e-3)
    shutil.rmtree(first.folder)
    attempt(run, home)
    losses = [e.data["train_loss"] for e in run.events() if e.type == "metrics"]
    assert losses[-1] < losses[0]
    assert Path(run.folder / "teacher" / "artefact.json").is_file()
    reverse = new_run(home, objective={"name": "distill", "teacher": TEACHER, "kind": "reverse"}, n_epochs=1)
    attempt(reverse, home)
    want = divergence(home, reverse, "tiny", "reverse")
    assert reverse.plan()["base"]["loss"] == pytest.approx(want, rel=1e-4)


def test_what_cannot_be_a_teacher_is_refused(home_with_teacher: Home) -> None:
    home = home_with_teacher
    with pytest.raises(SpecError, match="needs its option 'teacher': the model to learn from"):
        new_run(home, objective="distill")
    other = home.models / "foreign"
    shutil.copytree(home.models / TEACHER, other)
    text = (other / "tokenizer.json").read_text().replace('"<|endoftext|>"', '"<|otherend|>"')
    (other / "tokenizer.json").write_text(text)
    run = new_run(home, objective={"name": "distill", "teacher": "foreign"})
    with pytest.raises(SpecError, match=r"'foreign' and the student 'tiny' have different vocabularies.*answers"):
        attempt(run, home)
