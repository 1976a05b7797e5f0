"""A combination that cannot be trained is refused with its reason before any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job_kit import attempt, checked
from test_selected_jobs import base, new_run  # noqa: F401 a fixture

import tiny
from tunewright.core.errors import SpecError
from tunewright.core.home import Home
from tunewright.core.spec import parse_spec
from tunewright.models.heads import Head
from tunewright.models.loader import bare_model, load_model
from tunewright.train import run as train_run
from tunewright.train.run import part
from tunewright.tuners import TUNERS

SOFT = "is for decoders that run packed"
# family -> {tuner: what its refusal says}; every other tuner trains it
REFUSED: dict[str, dict[str, str]] = {
    "llama": {"bitfit": "trains biases, and this model .* has none"},
    "gpt2": {"oft": "their weights are transposed"},
    "t5": {"prompt": SOFT, "prefix": SOFT, "p_tuning": SOFT, "bitfit": "has none"},
    "bloom": {"prompt": SOFT, "prefix": SOFT, "p_tuning": SOFT},
    "bert": {"prompt": SOFT, "prefix": SOFT, "p_tuning": SOFT, "parallel": "no MLP was found"},
}
LABELS = Head("classify", ("no", "yes", "other"))


def head_of(family: str) -> Head | None:
    return LABELS if tiny.FAMILIES[family][2] == "classify" else None


@pytest.mark.parametrize("family", [f if f == "llama" else pytest.param(f, marks=pytest.mark.slow) for f in REFUSED])
@pytest.mark.parametrize("name", list(TUNERS))
def test_what_is_refused_without_weights_is_what_cannot_be_attached(
    built: Callable[[str], Path], family: str, name: str
) -> None:
    tuner: Any = part(TUNERS, parse_spec({"model": "m", "training_file": "f", "tuner": name}).tuner)
    bare = bare_model(built(family), head_of(family))
    assert all(p.device.type == "meta" for p in bare.parameters())
    said = REFUSED[family].get(name)
    if said is None:
        tuner.refuse(bare)
        return
    with pytest.raises(SpecError, match=said):
        tuner.refuse(bare)
    with pytest.raises(SpecError, match=said):
        part(TUNERS, parse_spec({"model": "m", "training_file": "f", "tuner": name}).tuner).attach(
            load_model(built(family), head=head_of(family)), 0
        )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tuner": "bitfit"}, "tuner 'bitfit' trains biases"),
        ({"tuner": {"name": "last_layers", "layers": 9}}, "the model has 2 layers. Use 1 to 2"),
        ({"tuner": {"name": "lora", "target_modules": ["q_prj"]}}, "Did you mean 'q_proj'"),
        ({"tuner": {"name": "lora", "experts": True}}, "option experts"),
        ({"tuner": {"name": "prompt", "virtual_tokens": 505}}, "leave at least"),
    ],
)
def test_a_job_says_so_before_it_loads(
    base: Home,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    said: str,
) -> None:
    def load(*args: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(train_run, "load_model", load)
    run = new_run(base, "lora", **fields)
    with pytest.raises(SpecError, match=said):
        attempt(run, base)
    assert run.plan() is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tuner": "full", "quantization": "int8"}, "which needs a frozen base, but the tuner 'full' trains weights"),
        ({"retain": ["ewc"]}, "retain 'ewc' needs rows"),
        ({"objective": "classify", "head": "lm"}, "but the objective 'classify' trains the head 'classify'"),
        ({"tuner": "loraa", "optimizer": "adam"}, "there is no tuner 'loraa'.*there is no optimizer 'adam'"),
    ],
)
def test_what_the_tables_know_is_said_before_there_is_a_run(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr("tunewright.core.spec.find_spec", lambda name: name)  # as if bitsandbytes were there
    with pytest.raises(SpecError, match=said):
        checked({"model": "m", "training_file": "f", **fields})
