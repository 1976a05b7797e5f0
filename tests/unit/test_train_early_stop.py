"""Which epoch is the best one, and when to stop: decided from the metrics of the epoch ends alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tunewright.core.errors import SpecError
from tunewright.core.events import EventWriter, read_events
from tunewright.core.spec import parse_spec
from tunewright.train import loop
from tunewright.train.checkpoint import State

FILES = {"model": "m", "training_file": "t", "validation_file": "v"}


@dataclass
class Parts:
    """What end_epoch looks at."""

    spec: Any
    events: EventWriter
    plan: Any = field(default_factory=lambda: type("P", (), {"total_steps": 100})())


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, values: list[float | None], **spec: Any) -> State:
    """The state after epochs with these values of the metric, ten steps each."""
    monkeypatch.setattr(loop, "say_advice", lambda parts, state: None)
    parts = Parts(parse_spec({**FILES, **spec}), EventWriter(folder / "events.jsonl", 1))
    state = State()
    for i, value in enumerate(values, 1):
        if state.stopped_early:
            break
        state.step = 10 * i
        loop.end_epoch(parts, state, {parts.spec.early_stop_metric: value, "train_loss": 1.0})  # type: ignore[arg-type]
    return state


def test_the_lowest_loss_is_the_best_and_patience_counts_epochs(tmp_path: Path, monkeypatch: Any) -> None:
    state = run(tmp_path, monkeypatch, [3.0, 2.0, 2.5, 2.1, 1.0], early_stopping=2)
    assert (state.best, state.stopped_early, state.step) == ({"step": 20, "value": 2.0}, True, 40)
    text = read_events(tmp_path / "events.jsonl")[0][-1].message
    assert text == "Stopping early after epoch 4: full_valid_loss has not improved since step 20."


def test_an_improvement_starts_the_count_again(tmp_path: Path, monkeypatch: Any) -> None:
    state = run(tmp_path, monkeypatch, [3.0, 3.1, 2.9, 3.0, 2.8], early_stopping=2)
    assert (state.best, state.stopped_early) == ({"step": 50, "value": 2.8}, False)


def test_accuracy_rises(tmp_path: Path, monkeypatch: Any) -> None:
    metric = {"early_stop_metric": "full_valid_mean_token_accuracy"}
    state = run(tmp_path, monkeypatch, [0.3, 0.5, 0.4], early_stopping=1, **metric)
    assert (state.best, state.stopped_early) == ({"step": 20, "value": 0.5}, True)


def test_a_metric_that_is_not_finite_is_no_improvement(tmp_path: Path, monkeypatch: Any) -> None:
    state = run(tmp_path, monkeypatch, [None, None, 1.0], early_stopping=2)
    assert (state.best, state.stopped_early, state.step) == (None, True, 20)


def test_without_early_stopping_the_best_is_still_known(tmp_path: Path, monkeypatch: Any) -> None:
    state = run(tmp_path, monkeypatch, [3.0, 2.0, 2.5])
    assert (state.best, state.stopped_early) == ({"step": 20, "value": 2.0}, False)


def test_a_metric_that_is_not_measured_is_an_error_and_not_silence(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(loop, "say_advice", lambda parts, state: None)
    spec = parse_spec({**FILES, "early_stopping": 1, "early_stop_metric": "full_valid_los"})
    with pytest.raises(SpecError, match=r"full_valid_los.*Did you mean 'full_valid_loss'"):
        loop.end_epoch(Parts(spec, EventWriter(tmp_path / "e", 1)), State(step=1), {"full_valid_loss": 1.0})  # type: ignore[arg-type]


@pytest.mark.parametrize("wish", [{"early_stopping": 1}, {"result": "best"}])
def test_a_wish_that_needs_validation_data_is_refused_before_training(wish: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="give a validation_file"):
        parse_spec({"model": "m", "training_file": "t", **wish})
    parse_spec({**FILES, **wish})
    parse_spec({"model": "m", "training_file": "t", "early_stop_metric": "train_loss", **wish})
