"""The loop: one optimizer step after another, one event each. Only the loop divides, and only by a step's weight.

A step's loss is the sum over terms of coef * total / weight, where total and weight run over all micro-batches of the
step. So the gradient is the same however the step is cut.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunewright.core.errors import Diverged, Interrupted
from tunewright.core.events import EventWriter
from tunewright.core.example import Group
from tunewright.core.run import Run
from tunewright.core.spec import JobSpec
from tunewright.models.policy import Policy
from tunewright.objectives.base import Objective
from tunewright.ops.packing import pack
from tunewright.ops.runtime import seed_step
from tunewright.ops.types import Term
from tunewright.train.checkpoint import State, prune, save_checkpoint
from tunewright.train.plan import Plan, step_rows, valid_rows
from tunewright.tuners.base import Tuner

MAX_SKIPPED = 3


@dataclass(frozen=True)
class Parts:
    """Everything a loop needs, composed in train/run.py.

    rate: learning rate of a step (1-based). write_artefact(folder, state): fills a new folder with a servable artefact.
    stop: whether the process was asked to stop; looked at between steps.
    """

    run: Run
    spec: JobSpec
    plan: Plan
    policy: Policy
    tuner: Tuner
    objective: Objective
    optimizer: torch.optim.Optimizer
    rate: Callable[[int], float]
    groups: Sequence[Group]
    valid: Sequence[Group]
    events: EventWriter
    write_artefact: Callable[[Path, State], None]
    stop: Callable[[], bool]


def accumulate(parts: Parts, groups: Sequence[Group], backward: bool) -> dict[str, float]:
    """Run the objective over `groups` in micro-batches; returns each term's mean, and adds gradients if `backward`."""
    batches = pack(list(groups), parts.plan.micro_batch_tokens)
    weights: dict[str, float] = {}
    for batch in batches:
        for name, weight in parts.objective.weights(batch).items():
            weights[name] = weights.get(name, 0.0) + weight
    sums = dict.fromkeys(weights, 0.0)
    for batch in batches:
        terms = parts.objective(parts.policy, batch.to(parts.policy.device))
        if backward:
            step_loss(terms, weights).backward()
        for name, term in terms.items():
            sums[name] += float(term.total.detach())
    return {name: sums[name] / weights[name] if weights[name] else 0.0 for name in sums}


def step_loss(terms: dict[str, Term], weights: dict[str, float]) -> torch.Tensor:
    """This micro-batch's share of the step's loss."""
    return torch.stack([t.total * (t.coef / weights[n]) for n, t in terms.items() if t.coef and weights[n]]).sum()


@torch.no_grad()
def evaluate(parts: Parts, groups: Sequence[Group]) -> dict[str, float]:
    """The terms' means over `groups`, without gradients."""
    parts.policy.model.eval()
    means = accumulate(parts, groups, backward=False)
    parts.policy.model.train()
    return means


def train(parts: Parts, state: State) -> State:
    """Run from `state` to the end of the plan (or an early stop). Raises Interrupted after a checkpoint when asked to.

    Every step writes one `metrics` event; every epoch end and every save_every_seconds a checkpoint.
    """
    per_epoch = math.ceil(parts.plan.n_rows / parts.plan.batch_size)
    started, first_tokens = time.monotonic(), state.tokens
    before, saved_at = state.seconds, started
    parts.policy.model.train()
    while state.step < parts.plan.total_steps and not state.stopped_early:
        step = state.step + 1
        groups = [parts.groups[i] for i in step_rows(parts.plan, step)]
        means, grad_norm = optimize(parts, step, groups, state)
        state.step = step
        state.tokens += sum(g.n_tokens for g in groups)
        state.supervised += sum(w > 0 for g in groups for e in g.examples for w in e.weights[1:])
        at_epoch_end = step % per_epoch == 0
        metrics = {
            "step": step,
            "total_steps": parts.plan.total_steps,
            "train_loss": finite(means["loss"]),
            "train_mean_token_accuracy": finite(means["accuracy"]),
            **validate(parts, step, at_epoch_end),
        }
        state.seconds = before + time.monotonic() - started
        speed = (state.tokens - first_tokens) / max(time.monotonic() - started, 1e-9)
        left = parts.plan.n_tokens * parts.plan.n_epochs - state.tokens
        state.last = metrics
        parts.events.write(
            "metrics",
            metrics_message(metrics),
            {
                **metrics,
                "lr": parts.rate(step),
                "grad_norm": finite(grad_norm),
                "trained_tokens": state.tokens,
                "supervised_tokens": state.supervised,
                "tokens_per_second": speed,
                "eta_s": left / speed,
            },
        )
        if at_epoch_end:
            end_epoch(parts, state, metrics)
        if at_epoch_end or parts.stop() or due(parts, step, saved_at):
            checkpoint(parts, state, "epoch" if at_epoch_end else "recovery")
            saved_at = time.monotonic()
        if parts.stop() and state.step < parts.plan.total_steps:
            raise Interrupted(f"Stopped after step {step}; a checkpoint was saved.")
    return state


def optimize(parts: Parts, step: int, groups: Sequence[Group], state: State) -> tuple[dict[str, float], float]:
    """One optimizer step over `groups`: returns the terms' means and the gradient norm before clipping.

    A loss or gradient that is not finite skips the update; the third in a row raises Diverged with the row numbers.
    """
    parameters = list(parts.tuner.trainable().values())
    seed_step(parts.plan.seed, step)
    for group in parts.optimizer.param_groups:
        group["lr"] = parts.rate(step)
    parts.optimizer.zero_grad(set_to_none=True)
    parts.tuner.before_step(step)
    means = accumulate(parts, groups, backward=True)
    penalty = parts.tuner.penalty()
    if penalty is not None:
        penalty.backward()
    parts.tuner.on_gradients(step)
    limit = parts.spec.max_grad_norm or math.inf
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    if math.isfinite(means["loss"]) and math.isfinite(norm):
        parts.optimizer.step()
        parts.tuner.after_step(step)
        state.skipped = 0
        return means, norm
    state.skipped += 1
    rows = sorted({e.source for g in groups for e in g.examples})
    if state.skipped >= MAX_SKIPPED:
        raise Diverged(
            f"Training diverged: loss or gradient was not finite in {MAX_SKIPPED} steps in a row, the last being "
            f"step {step} with rows {rows}. Lower the learning rate (now {parts.plan.learning_rate:g}) or look at "
            "these rows."
        )
    parts.events.write(
        "message", f"Step {step} was skipped: its loss is not finite. Rows: {rows}.", {"step": step}, "warn"
    )
    return means, norm


def validate(parts: Parts, step: int, at_epoch_end: bool) -> dict[str, Any]:
    """OpenAI's validation metrics of this step, as far as they are due."""
    out: dict[str, Any] = {}
    if not parts.valid:
        return out
    last = step == parts.plan.total_steps
    if step % parts.plan.eval_every == 0 or last:
        means = evaluate(parts, [parts.valid[i] for i in valid_rows(parts.plan, step, parts.spec.eval_rows)])
        out |= {"valid_loss": finite(means["loss"]), "valid_mean_token_accuracy": finite(means["accuracy"])}
    if at_epoch_end:
        means = evaluate(parts, parts.valid)
        out |= {"full_valid_loss": finite(means["loss"]), "full_valid_mean_token_accuracy": finite(means["accuracy"])}
    return out


def end_epoch(parts: Parts, state: State, metrics: dict[str, Any]) -> None:
    """Count the epoch and decide on the best checkpoint and on stopping early."""
    state.epoch += 1
    name = parts.spec.early_stop_metric
    value = metrics.get(name)
    if value is None:
        return
    lower_is_better = "loss" in name
    if state.best is None or (value < state.best["value"] if lower_is_better else value > state.best["value"]):
        state.best, state.bad_epochs = {"step": state.step, "value": value}, 0
        return
    state.bad_epochs += 1
    patience = parts.spec.early_stopping
    if patience is not None and state.bad_epochs >= patience and state.step < parts.plan.total_steps:
        state.stopped_early = True
        parts.events.write(
            "message",
            f"Stopping early after epoch {state.epoch}: {name} has not improved since step {state.best['step']}.",
            {"step": state.step},
        )


def due(parts: Parts, step: int, saved_at: float) -> bool:
    """Whether a recovery checkpoint is due."""
    every = parts.spec.save_every_steps
    return (every is not None and step % every == 0) or time.monotonic() - saved_at >= parts.spec.save_every_seconds


def checkpoint(parts: Parts, state: State, kind: str) -> None:
    """Commit a checkpoint, say so, and delete the ones not needed any more."""
    parts.events.sync()
    save_checkpoint(
        parts.run, state, kind, parts.tuner, parts.optimizer, lambda folder: parts.write_artefact(folder, state)
    )
    announce_checkpoint(parts.events, state, kind)
    prune(parts.run, state, parts.spec.keep_checkpoints)


def announce_checkpoint(events: EventWriter, state: State, kind: str) -> None:
    events.write(
        "checkpoint",
        f"Checkpoint created at step {state.step}",
        {"step": state.step, "kind": kind, "metrics": checkpoint_metrics(state.last)},
    )
    events.sync()


def checkpoint_metrics(last: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's checkpoint metrics: the step's own, without what was not measured."""
    return {k: v for k, v in last.items() if v is not None and k != "total_steps"}


def metrics_message(m: dict[str, Any]) -> str:
    """`Step 10/300: training loss=1.10, validation loss=1.20, full validation loss=1.15`, as OpenAI words it."""
    parts = [
        ("training loss", "train_loss"),
        ("validation loss", "valid_loss"),
        ("full validation loss", "full_valid_loss"),
    ]
    shown = [f"{label}={m[key]:.2f}" for label, key in parts if m.get(key) is not None]
    return f"Step {m['step']}/{m['total_steps']}: {', '.join(shown)}"


def finite(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None
