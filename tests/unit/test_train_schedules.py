"""The learning rate is a function of the step, equal to transformers' schedules."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError

from tunewright.train.optim import SCHEDULES

TOTAL, WARM, FALL = 50, 10, 15


def theirs(make: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[int], float]:
    """transformers' factor of a 0-based step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return make(optimizer, *arguments, **options).lr_lambdas[0]


def wsd(fall: str, min_factor: float) -> tuple[str, dict[str, Any], Callable[[int], float]]:
    names = {"linear": "linear", "sqrt": "1-sqrt", "cosine": "cosine"}
    reference = theirs(
        transformers.get_wsd_schedule, WARM, FALL, num_training_steps=TOTAL, decay_type=names[fall],
        min_lr_ratio=min_factor,
    )  # fmt: skip
    return "wsd", {"decay": FALL, "fall": fall, "min_factor": min_factor}, reference


CASES = [
    ("linear", {}, theirs(transformers.get_linear_schedule_with_warmup, WARM, TOTAL)),
    ("cosine", {}, theirs(transformers.get_cosine_schedule_with_warmup, WARM, TOTAL)),
    ("constant", {}, theirs(transformers.get_constant_schedule_with_warmup, WARM)),
    wsd("linear", 0.0),
    wsd("sqrt", 0.1),
    wsd("cosine", 0.25),
]


@pytest.mark.parametrize(("name", "options", "reference"), CASES)
def test_schedules_equal_transformers_after_the_shift_by_one(
    name: str, options: dict[str, Any], reference: Callable[[int], float]
) -> None:
    """Ours never has a step at rate 0: step s of ours is step s of the reference's 0-based count for warm-up."""
    schedule = SCHEDULES.load(name)
    chosen = schedule.Options(warmup=WARM, **options)
    # transformers' warm-up begins at min_factor, ours at nothing
    for step in range(WARM + 1 if options.get("min_factor") else 1, TOTAL + 1):
        expected = reference(step if step <= WARM else step - 1)
        assert schedule.factor(step, TOTAL, chosen) == pytest.approx(expected, abs=1e-12), step


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("total", [1, 2, 3, 40])
def test_every_step_has_a_rate_between_nothing_and_the_full_one(name: str, total: int) -> None:
    schedule = SCHEDULES.load(name)
    factors = [schedule.factor(step, total, schedule.Options()) for step in range(1, total + 1)]
    assert all(0 < f <= 1 for f in factors) and max(factors) == 1.0


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_warm_up_is_a_share_or_a_number_of_steps(name: str) -> None:
    schedule = SCHEDULES.load(name)
    for warmup in (0.2, 8):
        factors = [schedule.factor(step, 40, schedule.Options(warmup=warmup)) for step in range(1, 9)]
        assert factors == pytest.approx([s / 8 for s in range(1, 9)])
    with pytest.raises(ValidationError):
        schedule.Options(warmup=-1)
    json.dumps(schedule.Options.model_json_schema())


def test_wsd_stays_at_the_full_rate_until_the_fall() -> None:
    schedule = SCHEDULES.load("wsd")
    factors = [schedule.factor(s, 100, schedule.Options(warmup=0.1, decay=0.2)) for s in range(1, 101)]
    assert factors[9:81] == [1.0] * 72
    assert all(a > b for a, b in pairwise(factors[80:]))
