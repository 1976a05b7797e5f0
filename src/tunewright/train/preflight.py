"""Preflight: before step 1 run the heaviest micro-batch, and predict time and memory from what it took."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence

import psutil
import torch

from tunewright.core.errors import OutOfMemory
from tunewright.core.example import Group
from tunewright.models.policy import Policy
from tunewright.objectives.base import Objective
from tunewright.ops.packing import pack
from tunewright.train.loop import step_loss
from tunewright.train.plan import Plan, step_rows
from tunewright.tuners.base import Tuner, parameter_bytes

OPTIMIZER_COPIES = 2


def peak_bytes() -> int:
    """This process's peak resident memory so far, in bytes (ru_maxrss is in KiB on Linux, bytes on macOS)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_once(policy: Policy, objective: Objective, tuner: Tuner, groups: Sequence[Group], plan: Plan) -> float:
    """Forward and backward over `groups` once; returns seconds. Gradients are dropped, nothing is updated."""
    started = time.monotonic()
    for batch in pack(list(groups), plan.micro_batch_tokens):
        step_loss(objective(policy, batch.to(policy.device)), objective.weights(batch)).backward()
    seconds = time.monotonic() - started
    for p in tuner.trainable().values():
        p.grad = None
    return seconds


def preflight(
    policy: Policy, objective: Objective, tuner: Tuner, groups: Sequence[Group], valid_tokens: int, plan: Plan
) -> dict[str, float | int]:
    """{"peak_memory_bytes", "seconds_per_step", "predicted_seconds"} of the whole run.

    The longest groups are run once (memory, and to warm up), then the rows of the first steps (time). valid_tokens:
    tokens of all validation passes together. Raises OutOfMemory when the prediction exceeds what the machine has.
    """
    policy.model.train()
    longest = sorted(groups, key=lambda g: g.n_tokens, reverse=True)
    heavy: list[Group] = []
    for group in longest:
        if heavy and sum(g.n_tokens for g in heavy) + group.n_tokens > plan.micro_batch_tokens:
            break
        heavy.append(group)
    run_once(policy, objective, tuner, heavy, plan)
    sample = [groups[i] for s in range(1, min(plan.total_steps, 2) + 1) for i in step_rows(plan, s)]
    seconds = run_once(policy, objective, tuner, sample, plan)
    per_token = seconds / sum(g.n_tokens for g in sample)
    state = OPTIMIZER_COPIES * parameter_bytes(tuner.trainable())
    peak = peak_bytes() + state
    total_memory = psutil.virtual_memory().total
    if not torch.cuda.is_available() and peak > total_memory:
        raise OutOfMemory(
            f"This job would need about {peak / 2**30:.1f} GiB of memory; the machine has "
            f"{total_memory / 2**30:.1f} GiB. "
            f"Lower micro_batch_tokens (now {plan.micro_batch_tokens}) or max_length, or use the tuner 'lora'."
        )
    epoch = per_token * plan.n_tokens
    steps_per_epoch = math.ceil(plan.n_rows / plan.batch_size)
    forward_share = 1 / 3
    return {
        "peak_memory_bytes": int(peak),
        "seconds_per_step": epoch / steps_per_epoch,
        "predicted_seconds": epoch * plan.n_epochs + per_token * forward_share * valid_tokens,
    }
