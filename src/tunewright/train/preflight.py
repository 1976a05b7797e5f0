"""Preflight: before step 1 find what fits, run the longest rows, and predict the job's time and memory from it.

Memory: the high-water mark of the heaviest micro-batch, and what the optimizer will allocate. Time: seconds of real
steps for each unit of work (floating-point operations), times the work of all; clipping, the update, validation and
saves are measured apart.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tunewright.core.durable import commit_folder
from tunewright.core.example import Group
from tunewright.core.spec import parse_bytes
from tunewright.data.rendered import SQUARES, SUPERVISED, TOKENS, sizes
from tunewright.models import memory
from tunewright.models.layouts import causal_lm
from tunewright.models.shape import shape_of
from tunewright.ops import quant
from tunewright.ops.noise import dropouts_of
from tunewright.train import meter
from tunewright.train.fit import Room, drop_gradients, fitting
from tunewright.train.loop import EVALUATED_AT_ONCE, Parts, accumulate, add, means_of, pulls
from tunewright.train.plan import Plan, mean_of_epochs, step_rows
from tunewright.train.room import MARGIN
from tunewright.tuners.base import parameter_bytes

Build = Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]
PROBED = 1 << 24  # elements of a parameter that stand for the rest of it when the optimizer is timed
SAVE_PROBE = 8 << 20
LEAST_SECONDS, MOST_SECONDS, SHARE = 1.0, 5.0, 0.02  # of the predicted time, for measuring steps
MOST_STEPS = 20
BASE_SHARE = 0.02  # of the whole work, for the base model's loss on validation rows
BASE_ROWS = 32  # training rows that say it where there are none
_COUNTED = {"adapter": "lora", "delta": "full", "weights": "full"}


def preflight(parts: Parts, build: Build, peak: meter.Peak) -> Plan:
    """The plan with everything that was measured filled in. Weights, optimizer and gradients are left as they were.

    build: makes the job's optimizer over given parameters. Raises OutOfMemory when no setting fits.
    """
    parts.policy.model.train()
    trainable = parts.tuner.at_once()
    limit = int(MARGIN * meter.limit(parse_bytes(parts.spec.max_memory) if parts.spec.max_memory else None))
    state, update = probe_optimizer(build, trainable)
    state = max(0, state - state_bytes(parts.optimizer))
    meter.release()
    held = meter.resident() + parameter_bytes(trainable) + state
    shape = shape_of(causal_lm(parts.policy.model))
    kind = _COUNTED.get(parts.tuner.card.artefact, "lora")
    work = Work(memory.flops(shape, kind, getattr(parts.tuner.options, "r", 16)))
    room = Room(limit, shape, kind, state, held, could_be_nf4(parts))
    fitted = fitting(parts, room, peak)
    found = next(m for m in (measure(p, work) for p in fitted) if max(m.peak + state, held) <= limit)
    parts = found.parts
    epoch = work.of_epoch(parts) * found.seconds
    steps = math.ceil(parts.plan.n_rows / parts.plan.batch_size)
    total = parts.plan.n_epochs * (epoch + steps * (found.clip + update)) + validation(parts, work) * found.forward
    total += saves(parts, total) * save_seconds(parts, parameter_bytes(trainable) + state)
    return replace(
        parts.plan,
        base=found.base,
        available_memory_bytes=limit,
        peak_memory_bytes=max(found.peak + state, held, peak.so_far()),
        seconds_per_step=epoch / steps + found.clip + update,
        predicted_seconds=total,
        predicted_finish=time.time() + total,
    )


def could_be_nf4(parts: Parts) -> int:
    """Numbers of the base that `quantization: nf4` would hold in 4 bits; 0 where the job cannot have it or has it."""
    if parts.plan.quantization != quant.NONE or not parts.tuner.card.works_on_nf4:
        return 0
    model: Any = causal_lm(parts.policy.model)
    head = model.get_output_embeddings()
    linear = [m.weight for m in model.modules() if quant.can_be_quantised(m) and m is not head]
    return sum(w.numel() for w in linear if not w.requires_grad)


class Work:
    """Floating-point operations of a forward and backward over groups, from their sizes."""

    def __init__(self, flops: dict[str, float]) -> None:
        self._factors = np.zeros(3)
        for column, name in ((TOKENS, "token"), (SQUARES, "square"), (SUPERVISED, "supervised")):
            self._factors[column] = flops[name]

    def of(self, groups: Sequence[Group]) -> float:
        return float((sizes(groups) @ self._factors).sum())

    def of_epoch(self, parts: Parts) -> float:
        """Of the training rows of an epoch: all once, or, of several files, their shares."""
        if not parts.plan.mix:
            return self.of(parts.groups)
        return mean_of_epochs(parts.plan, self.each(parts.groups))

    def each(self, groups: Sequence[Group]) -> np.ndarray:
        return sizes(groups) @ self._factors


@dataclass(frozen=True)
class Measured:
    """base: see Plan. forward, seconds: of a pass without, and with, gradients for each unit of work. clip: seconds.
    peak: bytes held at most, without the optimizer's state."""

    parts: Parts
    base: dict[str, Any]
    forward: float
    seconds: float
    clip: float
    peak: int


def measure(parts: Parts, work: Work) -> Measured:
    """A few steps at the setting of `parts`, and the base model's loss."""
    steps = measure_steps(parts, work)
    drop_gradients(parts)
    base, forward = measure_base(parts, work, steps)
    return Measured(parts, base, forward, steps.seconds, steps.clip, meter.peak())


@dataclass(frozen=True)
class Steps:
    """The first steps of the job, without updates. seconds: of forward and backward a unit of work. clip: seconds.
    sums, weights: of the objective's terms over their `rows` rows."""

    seconds: float
    clip: float
    sums: dict[str, float]
    weights: dict[str, float]
    rows: int


def measure_steps(parts: Parts, work: Work) -> Steps:
    """Medians over steps that take up to SHARE of the predicted time, within LEAST_ and MOST_SECONDS; one at least.

    Of three and more the first is left out: it warms up.
    """
    rates: list[float] = []
    clips: list[float] = []
    sums, weights, rows = {}, {}, 0
    started = time.monotonic()
    for step in range(1, min(parts.plan.total_steps, MOST_STEPS) + 1):
        groups = [parts.groups[i] for i in step_rows(parts.plan, step)]
        drop_gradients(parts)
        begun = time.monotonic()
        part = accumulate(parts, groups, parts.plan.micro_batch_tokens, step)
        done = time.monotonic()
        pulls(parts)
        torch.nn.utils.clip_grad_norm_(list(parts.tuner.trainable().values()), math.inf)
        clips.append(time.monotonic() - done)
        rates.append((done - begun) / work.of(groups))
        add(sums, part[0])
        add(weights, part[1])
        rows += len(groups)
        whole = rates[-1] * work.of_epoch(parts) * parts.plan.n_epochs
        if time.monotonic() - started > max(LEAST_SECONDS, min(MOST_SECONDS, SHARE * whole)):
            break
    counted = slice(1, None) if len(rates) > 2 else slice(None)
    return Steps(statistics.median(rates[counted]), statistics.median(clips[counted]), sums, weights, rows)


def measure_base(parts: Parts, work: Work, steps: Steps) -> tuple[dict[str, Any], float]:
    """The base model's loss and accuracy on validation rows (else training rows), and seconds of a forward a work.

    All validation rows where that is quick, else rows spread evenly over the file. Training rows that the measured
    steps have seen count, unless noise was on, and few others are looked at.
    """
    sums, weights, rows = {}, {}, 0
    if len(parts.valid):
        groups, source = parts.valid, "validation"
        budget = BASE_SHARE * work.of_epoch(parts) * parts.plan.n_epochs
        n = max(8, int(len(groups) * min(1.0, 3 * budget / work.of(groups))))
    else:
        groups, source = parts.groups, "train"
        if not is_noisy(parts):
            sums, weights, rows = dict(steps.sums), dict(steps.weights), steps.rows
        # answers that are only imagined tell nothing
        n = 0 if parts.objective.card.needs_rollouts else max(0, BASE_ROWS - rows)
    n = min(n, len(groups) - (rows if source == "train" else 0))
    sample = [groups[i * len(groups) // n] for i in range(n)]
    started = time.monotonic()
    parts.policy.model.eval()
    with torch.no_grad():
        for at in range(0, len(sample), EVALUATED_AT_ONCE):
            part = accumulate(parts, sample[at : at + EVALUATED_AT_ONCE], parts.plan.micro_batch_tokens)
            add(sums, part[0])
            add(weights, part[1])
    parts.policy.model.train()
    seconds = time.monotonic() - started
    means = {k: v for k, v in means_of(sums, weights).items() if math.isfinite(v)}
    base = {"source": source, "rows": rows + len(sample), "loss": means.get("loss")}
    if "accuracy" in means:
        base["mean_token_accuracy"] = means["accuracy"]
    return base, seconds / work.of(sample) if sample else 0.0


def is_noisy(parts: Parts) -> bool:
    """Whether steps have dropout or noise on the embeddings."""
    return parts.policy.embedding_noise is not None or bool(dropouts_of(parts.policy.model))


def probe_optimizer(build: Build, parameters: dict[str, nn.Parameter]) -> tuple[int, float]:
    """(bytes of state, seconds of an update) over all parameters, from a copy of one parameter of each shape."""
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for name, p in parameters.items():
        kinds.setdefault((tuple(p.shape), p.dtype), []).append(name)
    copies, share = {}, {}
    for names in kinds.values():
        p = parameters[names[0]].detach()
        rows = max(1, min(p.shape[0], PROBED * p.shape[0] // p.numel())) if p.ndim else 1
        copy = nn.Parameter(p[:rows].clone() if p.ndim else p.clone())
        copy.grad = torch.full_like(copy, 1e-3)
        copies[names[0]] = copy
        share[names[0]] = len(names) * p.numel() / copy.numel()
    optimizer = build(copies)
    optimizer.step()
    started = time.monotonic()
    optimizer.step()
    seconds = time.monotonic() - started
    of_each = {name: _bytes(optimizer.state.get(p, {})) for name, p in copies.items()}
    total = sum(p.numel() for p in parameters.values())
    probed = sum(p.numel() for p in copies.values())
    return round(sum(n * share[name] for name, n in of_each.items())), seconds * total / probed


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What the optimizer holds already."""
    return sum(_bytes(state) for state in optimizer.state.values())


def _bytes(state: dict[str, Any]) -> int:
    return sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, torch.Tensor))


def validation(parts: Parts, work: Work) -> float:
    """The work of all validations of the job."""
    if not len(parts.valid):
        return 0.0
    whole = work.of(parts.valid)
    windows = math.ceil(parts.plan.total_steps / parts.plan.eval_every)
    share = min(1.0, parts.spec.eval_rows / len(parts.valid))
    return whole * (parts.plan.n_epochs + windows * share)


def saves(parts: Parts, seconds: float) -> int:
    """How many checkpoints the job will write."""
    timed = int(seconds / parts.spec.save_every_seconds)
    every = parts.spec.save_every_steps
    return parts.plan.n_epochs + max(timed - parts.plan.n_epochs, 0) + (parts.plan.total_steps // every if every else 0)


def save_seconds(parts: Parts, n: int) -> float:
    """Seconds to commit `n` bytes to the run folder, from a smaller amount."""
    size = min(n, SAVE_PROBE)
    folder = parts.run.folder / "probe.tmp-save"

    def fill(place: Path) -> None:
        (place / "data").write_bytes(os.urandom(1 << 20) * (size >> 20) + b"0" * (size & ((1 << 20) - 1)))
        for i in range(5):
            (place / f"small-{i}").write_bytes(b"0")

    started = time.monotonic()
    commit_folder(folder, fill)
    seconds = time.monotonic() - started
    shutil.rmtree(folder)
    return seconds * max(1.0, n / max(size, 1))
