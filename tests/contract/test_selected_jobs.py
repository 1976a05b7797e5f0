"""Whole jobs with tuners of selected parameters: resumed exactly, cut anyhow, continued, served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from job_kit import attempt, checked, stop_after, weights
from transformers import AutoModelForCausalLM

import tiny
from tunewright.core.errors import Interrupted, SpecError, TunewrightError
from tunewright.core.home import Home
from tunewright.core.run import Run, read_artefact
from tunewright.engine.engine import Engine
from tunewright.engine.request import parse_request
from tunewright.jobs.prepare import create_run
from tunewright.tuners.delta import merge_delta, read_delta

TUNERS: dict[str, dict[str, Any]] = {
    "fishmask": {"k": 500, "examples": 7},
    "child_d": {"examples": 12},
    "bitfit": {"add_biases": True},
    "last_layers": {"layers": 1},
    "child_f": {},
    "half": {"round_steps": 4},
}
DELTAS = ("fishmask", "child_d", "bitfit", "last_layers")
FIRST_ONLY = [n if n == "fishmask" else pytest.param(n, marks=pytest.mark.slow) for n in TUNERS]


@pytest.fixture
def base(tiny_home: Home) -> Home:
    tiny.write_rows(tiny_home.root / "train.jsonl", tiny.sft_rows(18))
    return tiny_home


def new_run(home: Home, name: str, **spec: Any) -> Run:
    train = home.root / "train.jsonl"
    fields = {
        "model": "tiny", "training_file": str(train), "dtype": "float32", "threads": 1, "seed": 1, "path": "plain",
        "n_epochs": 2, "batch_size": 5, "tuner": {"name": name, **TUNERS.get(name, {})},
        "optimizer": {"name": "adamw", "weight_decay": 0.1},
    }  # fmt: skip
    return create_run(home, checked({**fields, **spec}), train_path=train)


def story(run: Run) -> list[tuple[Any, ...]]:
    keys = ("step", "train_loss", "grad_norm", "lr")
    return [tuple(e.data[k] for k in keys) for e in run.events() if e.type == "metrics"]


@pytest.mark.parametrize("tuner", FIRST_ONLY)
def test_resume_is_exact(base: Home, tuner: str) -> None:
    """Mask, round and optimizer state: stopped in the middle, and stopped before step 1 while choosing."""
    golden, stopped = new_run(base, tuner), new_run(base, tuner)
    end = attempt(golden, base)
    assert end["status"] == "succeeded" and end["steps"] == 8
    chooses = tuner in ("fishmask", "child_d")
    number = 1
    for stops in ([4] if chooses else []) + [{"fishmask": 7, "child_d": 12}.get(tuner, 0) + 7]:
        with pytest.raises(Interrupted):
            attempt(stopped, base, number, stop_after(stops))
        number += 1
    assert len(story(stopped)) in range(3, 8)
    attempt(stopped, base, number)
    assert story(stopped) == story(golden)
    assert weights(stopped) == weights(golden)
    record = read_artefact(golden.result)
    assert (record.kind, record.base) == (("delta", "tiny") if tuner in DELTAS else ("weights", None))


@pytest.mark.parametrize("tuner", FIRST_ONLY)
def test_any_cut_of_a_step_is_the_step(base: Home, tuner: str) -> None:
    whole, cut = new_run(base, tuner), new_run(base, tuner, micro_batch_tokens=1)
    for run in (whole, cut):
        attempt(run, base)
    for a, b in zip(story(whole), story(cut), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tuner", TUNERS)
def test_the_result_is_served_and_says_what_was_trained(base: Home, tuner: str) -> None:
    run = new_run(base, tuner, n_epochs=8, learning_rate_multiplier=20)
    attempt(run, base)
    losses = [row[1] for row in story(run)]
    assert losses[-1] < losses[0] - 0.05
    folder = base.models / "tiny"
    if tuner in DELTAS:
        model: Any = merge_delta(AutoModelForCausalLM.from_pretrained(folder), run.result)
    else:
        model = AutoModelForCausalLM.from_pretrained(run.result)
    prompt = [5, 17, 300, 41]
    wanted = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 4:].tolist()
    engine, log = Engine(base, dtype="float32", threads=1), []
    asked = {"artefact": str(run.result), "prompt": prompt, "max_tokens": 8, "temperature": 0.0}
    engine.add_request(parse_request(asked), log.append)
    while engine.step():
        pass
    said = [e["token_id"] for e in log if e["type"] == "token"]
    assert said == wanted[: len(said)] and len(said) >= min(7, len(said))


@pytest.mark.slow
@pytest.mark.parametrize("tuner", DELTAS)
def test_a_job_goes_on_from_a_delta(base: Home, tuner: str) -> None:
    """With the same tuner from where it was, over the same base and with the same choice; with full from their sum."""
    first = new_run(base, tuner, learning_rate_multiplier=20)
    attempt(first, base)
    name = first.job().name
    again = new_run(base, tuner, model=name, n_epochs=1, learning_rate=1e-12)
    attempt(again, base)
    before, after = read_delta(first.result), read_delta(again.result)
    assert read_artefact(again.result).base == "tiny" and before.keys() == after.keys()
    for key, piece in before.items():
        assert piece.kind == after[key].kind
        assert piece.at is None or torch.equal(piece.at, after[key].at)  # type: ignore[arg-type]
        torch.testing.assert_close(piece.values, after[key].values, atol=1e-6, rtol=0)
    full = new_run(base, "full", model=name, n_epochs=1, learning_rate=1e-12)
    if tuner == "bitfit":
        return  # a plain Llama folder keeps its biases only with its config's flags
    attempt(full, base)
    assert story(full)[0][1] == pytest.approx(story(again)[0][1], abs=1e-5)


@pytest.mark.parametrize(
    "first, then, message",
    [
        ("last_layers", {"name": "last_layers", "layers": 2}, "holds 9 tensors, this job trains 18"),
        ("last_layers", "lora", "is of kind 'delta'.*goes on from kind 'adapter' only"),
        pytest.param("lora", {"name": "bitfit", "add_biases": True}, "is of kind 'adapter'", marks=pytest.mark.slow),
        pytest.param("fishmask", {"name": "fishmask", "k": 499}, "changes 500 entries", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_go_on_is_refused(base: Home, first: str, then: Any, message: str) -> None:
    made = new_run(base, first, n_epochs=1)
    attempt(made, base)
    with pytest.raises(SpecError, match=message):
        attempt(new_run(base, first, model=made.job().name, tuner=then), base)


@pytest.mark.slow
def test_a_damaged_choice_is_made_again(base: Home) -> None:
    run, other = new_run(base, "fishmask"), new_run(base, "fishmask")
    attempt(other, base)
    with pytest.raises(TunewrightError):
        attempt(run, base, 1, stop_after(10))
    path: Path = next(run.prepared.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-9])
    attempt(run, base, 2)
    assert any("is damaged and is made again" in e.message for e in run.events())
    assert weights(run) == weights(other)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("family", ["bert", "t5"])
@pytest.mark.parametrize("tuner", TUNERS)
def test_classifiers_and_encoder_decoders(home: Home, family: str, tuner: str) -> None:
    """A job of each, continued; a head for rows is trained whole and is in the delta."""
    tiny.build_reader(home.models / family, family)
    rows: list[dict[str, Any]] = tiny.label_rows(18)
    if family == "t5":
        rows = [{"prompt": r["text"], "completion": r["label"]} for r in rows]
    tiny.write_rows(home.root / "train.jsonl", rows)
    fields: dict[str, Any] = {"head": "classify", "objective": "classify"} if family == "bert" else {}
    if tuner == "bitfit" and family == "bert":
        fields["tuner"] = "bitfit"  # has biases of its own
    first = new_run(home, tuner, model=family, **fields)
    attempt(first, home)
    losses = [row[1] for row in story(first)]
    if tuner in DELTAS:
        delta = read_delta(first.result)
        heads = {key for key in delta if "classifier" in key}
        assert heads == ({"classifier.weight", "classifier.bias"} if family == "bert" else set())
    again = new_run(home, tuner, model=first.job().name, **fields, n_epochs=1)
    attempt(again, home)
    assert story(again)[0][1] < losses[0]
