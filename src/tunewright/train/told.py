"""What the loop says of a step: OpenAI's words for its metrics, and numbers that JSON has."""

from __future__ import annotations

import math
from typing import Any

LABELS = (
    ("training loss", "train_loss"),
    ("validation loss", "valid_loss"),
    ("full validation loss", "full_valid_loss"),
)
OF_REWARDS = (
    ("train mean reward", "train_mean_reward"),
    ("validation mean reward", "valid_mean_reward"),
    ("full validation mean reward", "full_valid_mean_reward"),
    ("full validation mean parse error", "full_valid_mean_parse_error"),
)


def metrics_message(m: dict[str, Any]) -> str:
    """`Step 10/300: training loss=1.10, validation loss=1.20`, or of rollouts `Step 10/20 , train mean reward=0.42`, as
    OpenAI words them."""
    of_rewards = "train_mean_reward" in m
    shown = [f"{label}={m[key]:.2f}" for label, key in (OF_REWARDS if of_rewards else LABELS) if m.get(key) is not None]
    return f"Step {m['step']}/{m['total_steps']}{' , ' if of_rewards else ': '}{', '.join(shown)}"


def checkpoint_metrics(last: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's checkpoint metrics: the step's own, without what was not measured."""
    return {k: v for k, v in last.items() if v is not None and k != "total_steps"}


def is_better(name: str, value: float, best: float) -> bool:
    """Whether a metric's value beats the best one: losses and errors fall, everything else rises."""
    return value < best if name.endswith(("loss", "error", "perplexity")) else value > best


def finite(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


def named(prefix: str, values: dict[str, float]) -> dict[str, float | None]:
    """Metrics under their names in events."""
    return {f"{prefix}{name}": finite(value) for name, value in values.items()}
