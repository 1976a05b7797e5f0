"""The loop: one optimizer step after another, one event each. Only the loop divides, and only by a step's weight.

A step's loss is the sum over terms of coef * total / weight, where total and weight run over all micro-batches of the
step. So the gradient is the same however the step is cut.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from tunewright.core.errors import EndpointDown, Interrupted, SpecError, did_you_mean
from tunewright.core.events import EventWriter
from tunewright.core.example import Group
from tunewright.core.run import Run
from tunewright.core.spec import JobSpec
from tunewright.models.policy import Policy
from tunewright.objectives.base import Objective
from tunewright.ops.noise import token_keys
from tunewright.ops.packing import pack
from tunewright.ops.runtime import seed_step
from tunewright.ops.types import Batch, Term
from tunewright.train import scaling, watch
from tunewright.train.advise import Epoch, History, advise
from tunewright.train.checkpoint import State, list_checkpoints, prune, save_checkpoint
from tunewright.train.plan import Plan, Where, step_rows, valid_rows
from tunewright.train.recovery import roll_back, skip, with_room
from tunewright.train.retain.base import Retain
from tunewright.train.rollouts import Rollout, Rollouts
from tunewright.train.told import checkpoint_metrics, finite, is_better, metrics_message, named
from tunewright.tuners.base import Tuner

SHOWN = ("retain_", "router_")  # how the terms begin that events show besides the objective's own
EVALUATED_AT_ONCE = 64  # rows of a validation that are in memory at the same time

T = TypeVar("T")


class Terms(Protocol):
    """What the loop asks of an objective, and of a method against forgetting that has rows of its own."""

    def weights(self, batch: Batch) -> dict[str, float]: ...

    def __call__(self, policy: Policy, batch: Batch, stats: Any = None) -> dict[str, Term]: ...


@dataclass(frozen=True)
class Parts:
    """Everything a loop needs, composed in train/run.py.

    rate: learning rate of a step (1-based). write_artefact(folder, state): fills a new folder with a servable artefact.
    stop: whether the process was asked to stop; looked at between steps. retain: methods against forgetting, begun.
    rollouts: where `groups` and `valid` are prompts that the model answers itself.
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
    retain: Sequence[Retain] = ()
    rollouts: Rollouts | None = None
    advised: set[str] = field(default_factory=set)  # advice that was given, in earlier attempts too

    def with_room(self, step: int, where: Where, groups: Sequence[Group], compute: Callable[[int], T]) -> T:
        """recovery.with_room of this run."""
        return with_room(self.run, self.plan, self.events, step, where, groups, compute, self.tuner.n_virtual)


def accumulate(
    parts: Parts, groups: Sequence[Group], tokens: int, step: int | None = None, scale: float = 1.0
) -> tuple[dict[str, float], dict[str, float]]:
    """Run the objective over `groups` in micro-batches of `tokens`; returns each term's sum and its weight.

    step: adds the gradients of the loss times `scale`, with this step's noise, and those of the methods against
    forgetting over rows of their own; None: no gradients and no noise.
    """
    sums, weights = run_terms(parts, parts.objective, groups, tokens, step, scale)
    if step is None:
        return sums, weights
    for method in parts.retain:
        own = method.draw(step, groups)
        if len(own):
            more = run_terms(parts, method, own, tokens, step, scale)
            add(sums, more[0])
            add(weights, more[1])
    return sums, weights


def run_terms(
    parts: Parts, objective: Terms, groups: Sequence[Group], tokens: int, step: int | None, scale: float = 1.0
) -> tuple[dict[str, float], dict[str, float]]:
    """One objective over its groups: as accumulate, which has the arguments."""
    virtual = parts.tuner.n_virtual
    batches = pack(list(groups), tokens, virtual, share=parts.policy.shares_prefixes and not virtual)
    if step is not None:
        batches = [replace(b, noise_T=token_keys(b, parts.plan.seed, step)) for b in batches]
    weights: dict[str, float] = {}
    for batch in batches:
        add(weights, objective.weights(batch))
    sums = dict.fromkeys(weights, 0.0)
    look = getattr(objective, "stats", None)
    stats = None if look is None else look(parts.policy, [b.to(parts.policy.device) for b in batches])
    for batch in batches:
        terms = objective(parts.policy, batch.to(parts.policy.device), stats)
        if step is not None:
            (step_loss(terms, weights) * scale).backward()
        add(sums, {name: float(term.total.detach()) for name, term in terms.items()})
    return sums, weights


def add(sums: dict[str, float], more: dict[str, float]) -> None:
    for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + value


def means_of(sums: dict[str, float], weights: dict[str, float]) -> dict[str, float]:
    return {name: sums[name] / weights[name] if weights[name] else 0.0 for name in sums}


def step_loss(terms: dict[str, Term], weights: dict[str, float]) -> torch.Tensor:
    """This micro-batch's share of the step's loss."""
    return torch.stack([t.total * (t.coef / weights[n]) for n, t in terms.items() if t.coef and weights[n]]).sum()


@torch.no_grad()
def evaluate(parts: Parts, groups: Sequence[Group], step: int) -> dict[str, float]:
    """The terms' means over `groups` after `step`, without gradients and with few of them in memory at once."""
    parts.policy.model.eval()
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for at in range(0, len(groups), EVALUATED_AT_ONCE):
        some = groups[at : at + EVALUATED_AT_ONCE]
        part = parts.with_room(step, "valid", some, lambda tokens, some=some: accumulate(parts, some, tokens))
        add(sums, part[0])
        add(weights, part[1])
    parts.policy.model.train()
    return means_of(sums, weights)


def train(parts: Parts, state: State) -> State:
    """Run from `state` to the end of the plan (or an early stop). Raises Interrupted after a checkpoint when asked to.

    Every step writes one `metrics` event; every epoch end and every save_every_seconds a checkpoint.
    """
    per_epoch = math.ceil(parts.plan.n_rows / parts.plan.batch_size)
    started, first_tokens, first_step = time.monotonic(), state.tokens, state.step
    before, saved_at = state.seconds, started
    parts.policy.model.train()
    scaling.start(state, parts.plan.dtype)
    say_advice(parts, state)
    while state.step < parts.plan.total_steps and not state.stopped_early:
        step = state.step + 1
        groups = [parts.groups[i] for i in step_rows(parts.plan, step)]
        rolled = answered(parts, step, groups, state)
        groups, updates = (groups, 1) if rolled is None else (rolled.groups, rolled.updates)
        *_, (means, grad_norm) = (optimize(parts, step, groups, state) for _ in range(updates))
        state.step = step
        state.tokens += sum(g.n_tokens for g in groups)
        state.supervised += sum(w > 0 for g in groups for e in g.examples for w in e.weights[1:])
        at_epoch_end = step % per_epoch == 0
        metrics = {
            "step": step,
            "total_steps": parts.plan.total_steps,
            **measured(parts, "train_", means),
            **({} if rolled is None else named("train_", rolled.figures)),
            **validate(parts, step, at_epoch_end),
        }
        took = max(time.monotonic() - started, 1e-9)
        speed = (state.tokens - first_tokens) / took
        state.last = metrics
        state.seconds = before + time.monotonic() - started
        parts.events.write(
            "metrics",
            metrics_message(metrics),
            {
                **metrics,
                **{name: finite(value) for name, value in means.items() if name.startswith(SHOWN)},
                "lr": parts.rate(step),
                "grad_norm": finite(grad_norm),
                "trained_tokens": state.tokens,
                "supervised_tokens": state.supervised,
                "tokens_per_second": speed,
                "eta_s": seconds_left(parts, state, speed, took / (step - first_step)),
            },
        )
        keep_watch(parts, state, grad_norm, groups)
        if at_epoch_end:
            end_epoch(parts, state, metrics)
        if at_epoch_end or parts.stop() or (state.skipped == 0 and due(parts, step, saved_at)):
            checkpoint(parts, state, "epoch" if at_epoch_end else "recovery")
            saved_at = time.monotonic()
        if parts.stop() and state.step < parts.plan.total_steps:
            raise Interrupted(f"Stopped after step {step}; a checkpoint was saved.")
    state.seconds = before + time.monotonic() - started
    return state


def answered(parts: Parts, step: int, prompts: Sequence[Group], state: State) -> Rollout | None:
    """The model's own answers to a step's prompts, graded; None where rows have theirs. If that cannot go on (a judge
    is down, a stop was asked for), what was trained so far is saved."""
    if parts.rollouts is None:
        return None
    try:
        return parts.rollouts.roll(step, prompts, parts.plan)
    except (EndpointDown, Interrupted):
        if state.step and state.step not in list_checkpoints(parts.run):
            checkpoint(parts, state, "recovery")
        raise


def seconds_left(parts: Parts, state: State, speed: float, a_step: float) -> float:
    """speed: tokens a second. a_step: seconds; of answers nobody knows before how many tokens they have."""
    if parts.rollouts is not None:
        return (parts.plan.total_steps - state.step) * a_step
    return (parts.plan.n_tokens * parts.plan.n_epochs - state.tokens) / speed


def optimize(parts: Parts, step: int, groups: Sequence[Group], state: State) -> tuple[dict[str, float], float]:
    """One optimizer step over `groups`: returns the terms' means and the gradient norm before clipping.

    A loss or gradient that is not finite skips the update (train/recovery.py). Without groups (all rewards of each
    group were equal) there is nothing to learn, and no update.
    """
    if not groups:
        return {"loss": math.nan, "accuracy": math.nan}, 0.0
    parameters = trained(parts.optimizer)
    for group in parts.optimizer.param_groups:
        group["lr"] = parts.rate(step)
    means = parts.with_room(step, "train", groups, lambda tokens: gradients(parts, step, groups, tokens, state))
    parts.tuner.on_gradients(step)
    means |= pulls(parts)
    norm = scaling.clip(parameters, parts.spec.max_grad_norm or math.inf)
    if math.isfinite(means["loss"]) and math.isfinite(norm):
        parts.tuner.update(parts.optimizer, step)
        torch.autograd.graph.increment_version(parameters)  # fused optimizers forget to, and the fast path relies on it
        parts.tuner.after_step(step)
        state.skipped, state.bad_rows = 0, []
        scaling.grow(state)
    else:
        state.alarms += 1
        skip(parts.run, parts.plan, parts.events, state, step, rows_of(groups))
    return means, norm


def pulls(parts: Parts) -> dict[str, float]:
    """Add the pulls of the methods against forgetting to the gradients; returns the penalties."""
    found = {method.term: method.pull() for method in parts.retain}
    return {name: value for name, value in found.items() if value is not None}


def trained(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """All that is trained. The tuner knows it too, but looks through the whole model for it."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def gradients(parts: Parts, step: int, groups: Sequence[Group], tokens: int, state: State) -> dict[str, float]:
    """Leave the step's gradients on the parameters; returns the terms' means. Begins anew each time it is called.

    In float16 the loss is scaled; where that overflows, the step is computed again at a smaller scale, so none is lost.
    """
    while True:
        seed_step(parts.plan.seed, step)
        parts.optimizer.zero_grad(set_to_none=True)
        parts.tuner.before_step(step)
        sums, weights = accumulate(parts, groups, tokens, step, state.loss_scale)
        penalty = parts.tuner.penalty()
        if penalty is not None:
            (penalty * state.loss_scale).backward()
        fits = scaling.unscale(trained(parts.optimizer), state)
        if fits or not math.isfinite(sums["loss"]):
            return means_of(sums, weights)


def rows_of(groups: Sequence[Group]) -> list[int]:
    """The rows' numbers in the training file, ascending."""
    return sorted({e.source for g in groups for e in g.examples})


def keep_watch(parts: Parts, state: State, grad_norm: float, groups: Sequence[Group]) -> None:
    """Enter the step into the divergence watch and do what its rules say."""
    loss = state.last["train_loss"]
    if loss is not None:
        state.loss_sum, state.loss_steps = state.loss_sum + loss, state.loss_steps + 1
    values = {"loss": loss, "grad_norm": finite(grad_norm) if groups else None, **watch.of_rollouts(state.last)}
    for alarm in watch.look(state.history, state.streaks, state.step, values):
        text = f"{alarm.rule.says} ({alarm.value:.4g} against {alarm.median:.4g}) since step {alarm.first}"
        state.alarms += 1
        if alarm.action == "act":
            roll_back(parts.run, parts.plan, parts.events, alarm.first, state.step, text, rows_of(groups))
        warning = f"Training may be diverging: {text}. {alarm.rule.advice}"
        parts.events.write("message", warning, {"step": state.step, "watch": alarm.rule.name}, "warn")


def say_advice(parts: Parts, state: State) -> None:
    """Write each advice that the run's history calls for once."""
    if parts.rollouts is not None:
        return  # its rules read losses, and that of rollouts says nothing
    usual = parts.tuner.card.default_lr * parts.objective.card.lr_factor
    history = History(usual, [Epoch(**e) for e in state.epochs], state.alarms)
    for name, text in advise(parts.plan, history).items():
        if name not in parts.advised:
            parts.advised.add(name)
            parts.events.write("message", text, {"advice": name}, "warn")


def validate(parts: Parts, step: int, at_epoch_end: bool) -> dict[str, Any]:
    """OpenAI's validation metrics of this step, as far as they are due."""
    out: dict[str, Any] = {}
    if not parts.valid:
        return out
    if step % parts.plan.eval_every == 0 or step == parts.plan.total_steps:
        window = [parts.valid[i] for i in valid_rows(parts.plan, step, parts.spec.eval_rows)]
        out |= evaluated(parts, "valid_", window, step)
    if at_epoch_end:
        out |= evaluated(parts, "full_valid_", parts.valid, step)
    return out


def evaluated(parts: Parts, prefix: str, groups: Sequence[Group], step: int) -> dict[str, float | None]:
    """The metrics of validation rows under their names in events."""
    if parts.rollouts is not None:
        return named(prefix, parts.rollouts.evaluate(step, groups, parts.plan))
    return measured(parts, prefix, evaluate(parts, groups, step))


def measured(parts: Parts, prefix: str, means: dict[str, float]) -> dict[str, float | None]:
    """The terms' means under their names in events, with what the objective makes of them besides (F1 …)."""
    report = getattr(parts.objective, "report", None) or (lambda means: {})
    return named(prefix, {"loss": means["loss"], "mean_token_accuracy": means["accuracy"], **report(means)})


def end_epoch(parts: Parts, state: State, metrics: dict[str, Any]) -> None:
    """Count the epoch and decide on the best checkpoint and on stopping early."""
    state.epoch += 1
    if state.loss_steps:
        mean = state.loss_sum / state.loss_steps
        state.epochs.append({"step": state.step, "train_loss": mean, "valid_loss": metrics.get("full_valid_loss")})
    state.loss_sum, state.loss_steps = 0.0, 0
    say_advice(parts, state)
    name, patience = parts.spec.early_stop_metric, parts.spec.early_stopping
    if name not in metrics:
        if patience is not None or parts.spec.result == "best":
            known = sorted(k for k, v in metrics.items() if isinstance(v, float))
            text = f"early_stop_metric is '{name}', which this job does not measure.{did_you_mean(name, known)}"
            raise SpecError(f"{text} It measures: {', '.join(known)}.", param="early_stop_metric")
        return
    value = metrics[name]  # None where it is not finite, which is no improvement
    if value is not None and (state.best is None or is_better(name, value, state.best["value"])):
        state.best, state.bad_epochs = {"step": state.step, "value": value}, 0
        return
    state.bad_epochs += 1
    if patience is not None and state.bad_epochs >= patience and state.step < parts.plan.total_steps:
        state.stopped_early = True
        since = f" since step {state.best['step']}" if state.best else ""
        parts.events.write(
            "message",
            f"Stopping early after epoch {state.epoch}: {name} has not improved{since}.",
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
