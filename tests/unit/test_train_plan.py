"""What was `auto` becomes numbers once; data order is a function of the step."""

import math

import pytest

from tunewright.core.errors import SpecError
from tunewright.core.example import Example, Group
from tunewright.core.spec import parse_spec
from tunewright.train.fit import fullest_step
from tunewright.train.plan import Plan, auto_batch_size, auto_epochs, resolve, step_rows, valid_rows
from tunewright.tuners.base import TunerCard

CARD = TunerCard("t", "adapter", True, True, True, 1e-3)


def plan_of(n: int, **spec: object) -> Plan:
    groups = [Group((Example((1, 2, 3), (0, 1, 1), i + 1),)) for i in range(n)]
    return resolve(
        parse_spec({"model": "m", "training_file": "f", **spec}),
        groups,
        groups[:7],
        CARD,
        dtype="float32",
        threads=1,
        context=512,
        parameters=10,
        trainable=5,
        versions={},
    )


@pytest.mark.parametrize(("n", "batch", "epochs"), [(10, 4, 3), (33, 8, 2), (8, 8, 1), (7, 3, 5)])
def test_each_epoch_sees_every_row_once(n: int, batch: int, epochs: int) -> None:
    plan = plan_of(n, batch_size=batch, n_epochs=epochs)
    assert plan.total_steps == math.ceil(n / batch) * epochs
    seen = [step_rows(plan, s) for s in range(1, plan.total_steps + 1)]
    per_epoch = math.ceil(n / batch)
    for e in range(epochs):
        rows = [i for step in seen[e * per_epoch : (e + 1) * per_epoch] for i in step]
        assert sorted(rows) == list(range(n))
    assert all(len(s) == batch for i, s in enumerate(seen) if (i + 1) % per_epoch)


@pytest.mark.parametrize(("n", "batch", "epochs"), [(10, 4, 3), (33, 8, 2), (7, 8, 1)])
def test_the_fullest_step_is_one_that_comes(n: int, batch: int, epochs: int) -> None:
    plan = plan_of(n, batch_size=batch, n_epochs=epochs)
    lengths = [2 + 7 * i % 31 for i in range(n)]
    groups = [Group((Example((1,) * k, (1.0,) * k, i + 1),)) for i, k in enumerate(lengths)]
    steps = [step_rows(plan, s) for s in range(1, plan.total_steps + 1)]
    found = fullest_step(plan, groups)
    assert found in steps
    assert sum(lengths[i] for i in found) == max(sum(lengths[i] for i in rows) for rows in steps)


def test_order_differs_by_epoch_and_seed_and_is_repeatable() -> None:
    plan = plan_of(64, batch_size=64, n_epochs=2, seed=1)
    other = plan_of(64, batch_size=64, n_epochs=2, seed=2)
    assert step_rows(plan, 1) == step_rows(plan, 1)
    assert step_rows(plan, 1) != step_rows(plan, 2)
    assert step_rows(plan, 1) != step_rows(other, 1)


def test_auto_follows_the_published_rules() -> None:
    assert [auto_epochs(n) for n in (4, 10, 30, 300)] == [25, 10, 4, 3]
    assert [auto_batch_size(n) for n in (1, 10, 40, 10_000)] == [1, 2, 8, 8]
    plan = plan_of(300, learning_rate_multiplier=0.5)
    assert (plan.learning_rate, plan.learning_rate_multiplier) == (5e-4, 0.5)


def test_nothing_left_to_train_on_is_said() -> None:
    with pytest.raises(SpecError, match="No training row is left"):
        plan_of(0)


def test_validation_rows_move_through_the_file() -> None:
    plan = plan_of(40, batch_size=4, n_epochs=2, eval_every=1)
    seen = {i for s in range(1, plan.total_steps + 1) for i in valid_rows(plan, s, 3)}
    assert seen == set(range(7))
    assert sorted(valid_rows(plan, 1, 100)) == list(range(7))
