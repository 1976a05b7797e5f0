"""What was `auto` becomes numbers once; data order and learning rate are functions of the step."""

import math

import pytest
import torch
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup
from transformers import get_linear_schedule_with_warmup as linear_with_warmup

from tunewright.core.errors import SpecError
from tunewright.core.example import Example, Group
from tunewright.core.spec import parse_spec
from tunewright.train import optim
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


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        (optim.Linear, linear_with_warmup),
        (optim.Cosine, get_cosine_schedule_with_warmup),
        (optim.Constant, get_constant_schedule_with_warmup),
    ],
)
def test_schedules_equal_transformers_after_the_shift_by_one(schedule: type, reference: object) -> None:
    """Ours never has a step at rate 0: step s of ours is step s of the reference's 0-based count for warm-up."""
    total, warm = 50, 10
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    arguments = (warm,) if schedule is optim.Constant else (warm, total)
    theirs = reference(optimizer, *arguments)
    lambdas = theirs.lr_lambdas[0]
    options = schedule.Options(warmup=warm)
    for step in range(1, warm + 1):
        assert schedule.factor(step, total, options) == pytest.approx(lambdas(step))
    for step in range(warm + 1, total + 1):
        assert schedule.factor(step, total, options) == pytest.approx(lambdas(step - 1), abs=1e-12)


def test_a_one_step_job_has_a_rate() -> None:
    assert optim.Linear.factor(1, 1, optim.Linear.Options()) == 1.0


def test_adamw_equals_the_plain_formula() -> None:
    """Three steps of AdamW by the paper's algorithm 2, in float64."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(3, 4))
    options = optim.AdamW.Options(weight_decay=0.1)
    optimizer = optim.AdamW.build({"w": p}, 0.01, options)
    w, m, v = p.detach().double().clone(), torch.zeros(3, 4).double(), torch.zeros(3, 4).double()
    for t in range(1, 4):
        g = torch.randn(3, 4)
        p.grad = g.clone()
        optimizer.step()
        gd = g.double()
        m, v = 0.9 * m + 0.1 * gd, 0.999 * v + 0.001 * gd**2
        w = w - 0.01 * 0.1 * w - 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_optimizer_state_survives_a_round_trip() -> None:
    parameters = {"a": torch.nn.Parameter(torch.randn(2, 3)), "b": torch.nn.Parameter(torch.randn(3))}
    first = optim.AdamW.build(parameters, 0.1, optim.AdamW.Options())
    for p in parameters.values():
        p.grad = torch.randn_like(p)
    first.step()
    saved = optim.optimizer_state(first, {id(p): n for n, p in parameters.items()})
    second = optim.AdamW.build(parameters, 0.1, optim.AdamW.Options())
    optim.load_optimizer_state(second, parameters, {k: v.clone() for k, v in saved.items()})
    for p in parameters.values():
        assert {k: v.tolist() for k, v in first.state[p].items()} == {k: v.tolist() for k, v in second.state[p].items()}
