"""The divergence watch and the advice: each rule speaks where it should, and only there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tunewright.train.advise import RULES, Epoch, History, advise
from tunewright.train.plan import Plan
from tunewright.train.watch import ENOUGH, WINDOW, look, of_rollouts

PLAN = Plan(
    n_rows=1000, n_valid_rows=50, n_tokens=100_000, n_epochs=3, batch_size=8, total_steps=375, learning_rate=1e-3,
    learning_rate_multiplier=1.0, seed=0, dtype="float32", threads=1, micro_batch_tokens=2048, eval_every=37,
    max_length=512, parameters=10, trainable_parameters=5, base={"loss": 3.0, "source": "validation"},
)  # fmt: skip


def watch(losses: list[float | None], norms: list[float | None] | None = None) -> tuple[list[Any], dict[str, Any]]:
    history: dict[str, list[float]] = {}
    streaks: dict[str, int] = {}
    found = []
    for step, loss in enumerate(losses, 1):
        norm = norms[step - 1] if norms else 1.0
        found += [(step, a) for a in look(history, streaks, step, {"loss": loss, "grad_norm": norm})]
    return found, history


def test_ordinary_noise_is_no_alarm() -> None:
    found, history = watch([2.0 + (i * 7 % 5) / 2 for i in range(200)])
    assert found == [] and len(history["loss"]) == WINDOW


def test_a_streak_warns_once_and_then_asks_to_roll_back() -> None:
    found, history = watch([2.0] * 20 + [5.1] * 10)
    assert [(step, a.action, a.first) for step, a in found] == [(23, "warn", 21), (28, "act", 21)]
    assert set(history["loss"]) == {2.0}


def test_a_streak_that_ends_counts_anew() -> None:
    found, _ = watch([2.0] * 20 + ([9.0, 9.0, 2.0] * 10))
    assert found == []


def test_gradients_are_watched_too_and_what_is_no_number_is_left_out() -> None:
    found, _ = watch([2.0] * 40, [1.0] * 20 + [None, *[21.0] * 19])
    assert [(step, a.action, a.rule.name) for step, a in found] == [(24, "warn", "grad_norm"), (29, "act", "grad_norm")]


def test_nothing_is_said_before_there_is_a_median() -> None:
    assert watch([1.0] * (ENOUGH - 1) + [100.0])[0] == []


def epochs(*pairs: tuple[float, float | None]) -> list[Epoch]:
    return [Epoch(10 * i, train, valid) for i, (train, valid) in enumerate(pairs, 1)]


TROUBLES: dict[str, tuple[dict[str, Any], list[Epoch], dict[str, Any]]] = {
    "overfitting": ({}, epochs((2.0, 2.1), (1.0, 1.9), (0.3, 2.2)), {}),
    "underfitting": ({}, epochs((2.9, 2.8), (2.5, 2.4), (2.0, 2.0)), {}),
    "learns_nothing": ({}, epochs((3.0, 3.0), (3.0, 2.99), (2.99, 2.98)), {}),
    "instability": ({}, [], {"alarms": 2}),
    "too_few_rows": ({"n_rows": 20}, [], {}),
    "unusual_rate": ({"learning_rate": 0.1}, [], {}),
    "unusual_epochs": ({"n_epochs": 20}, [], {}),
}
FINE = epochs((2.0, 2.1), (1.6, 1.8), (1.5, 1.75))


@pytest.mark.parametrize("name", RULES)
def test_each_trouble_is_named_with_its_fix_and_nothing_else_is(name: str) -> None:
    changes, seen, more = TROUBLES[name]
    said = advise(replace(PLAN, **changes), History(usual_rate=1e-3, epochs=seen, **more))
    assert list(said) == [name]
    text = said[name].lower()
    assert any(word in text for word in ("set ", "raise ", "lower ", "collect "))


def test_a_job_that_goes_well_gets_no_advice() -> None:
    assert advise(PLAN, History(1e-3, FINE)) == {}
    assert advise(PLAN, History(1e-3)) == {}
    by_heart = epochs((2.0, None), (1.0, None), (0.5, None))
    assert advise(PLAN, History(1e-3, by_heart)) == {}


def test_few_steps_and_a_tiny_rate_are_unusual_too() -> None:
    assert list(advise(replace(PLAN, total_steps=5), History(1e-3))) == ["unusual_epochs"]
    assert list(advise(replace(PLAN, learning_rate=1e-6), History(1e-3))) == ["unusual_rate"]


def test_without_validation_the_training_loss_is_compared() -> None:
    plan = replace(PLAN, base={"loss": 3.0, "source": "train"})
    assert list(advise(plan, History(1e-3, epochs((3.0, None), (3.0, None), (3.0, None))))) == ["learns_nothing"]


def rewarded(rewards: list[float], kls: list[float]) -> list[tuple[int, str, str]]:
    """(step, rule, what it asks for) of each alarm."""
    history: dict[str, list[float]] = {}
    streaks: dict[str, int] = {}
    found = []
    for step, (reward, kl) in enumerate(zip(rewards, kls, strict=True), 1):
        values = {"loss": 0.0, "grad_norm": 1.0, **of_rollouts({"train_mean_reward": reward, "train_kl": kl})}
        found += [(step, a.rule.name, a.action) for a in look(history, streaks, step, values)]
    return found


def test_a_reward_that_collapses_and_a_kl_that_explodes_are_told_once_and_nothing_is_rolled_back() -> None:
    ordinary = [0.5 + (i * 7 % 5) / 20 for i in range(40)]
    assert rewarded(ordinary, [0.01 * i for i in range(40)]) == []
    assert rewarded(ordinary + [0.1] * 20, [0.05] * 60) == [(45, "lost_reward", "warn")]
    assert rewarded(ordinary + [0.6] * 20, [0.05] * 40 + [3.0] * 20) == [(43, "kl", "warn")]
    below = [-1.0 - (i * 7 % 5) / 20 for i in range(40)]
    assert rewarded(below + [-4.0] * 10, [0.0] * 50) == [(45, "lost_reward", "warn")]
    assert of_rollouts({"train_kl": 9.0}) == {}
