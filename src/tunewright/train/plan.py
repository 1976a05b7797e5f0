"""plan.json: every number that was `auto`, decided once. Later attempts obey it, or resume could not be exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tunewright.core.errors import SpecError
from tunewright.core.example import Group
from tunewright.core.spec import JobSpec
from tunewright.data.rendered import TOKENS, JoinedGroups, sizes
from tunewright.train.mix import mixed_rows, quotas, rows_in_turn
from tunewright.train.shuffle import order
from tunewright.tuners.base import TunerCard

MICRO_BATCH_TOKENS = 2048
CHECKPOINTING = ("none", "selective", "full")


@dataclass(frozen=True)
class Plan:
    """n_tokens: tokens of one epoch. path: `fast` (own kernels) or `plain` (the model's modules).
    teacher_path: the same for the teacher's model, where there is one.
    quantization: how the base is held, `none`, `nf4` or `int8`.
    checkpointing: layers that are computed again in the backward, `none`, `selective`
    (every second one) or `full`. base: loss and accuracy before step 1. available_memory_bytes: what the job may hold.
    peak_memory_bytes, seconds_per_step, predicted_seconds: measured predictions; predicted_finish in Unix seconds.
    halvings: [{"step", "where", "micro_batch_tokens"}], what running out of memory changed, and from when on.
    rollbacks: [{"step", "to", "lr_factor", "why", "rows"}], where the job went back to, and the slower rate since.
    mix: [rows, rows of them in an epoch] of each training file, where there are several. in_turn: all epochs of one
    file come before the next file.
    """

    n_rows: int
    n_valid_rows: int
    n_tokens: int
    n_epochs: int
    batch_size: int
    total_steps: int
    learning_rate: float
    learning_rate_multiplier: float
    seed: int
    dtype: str
    threads: int
    micro_batch_tokens: int
    eval_every: int
    max_length: int
    parameters: int
    trainable_parameters: int
    path: str = "plain"
    teacher_path: str = ""
    quantization: str = "none"
    checkpointing: str = "none"
    base: dict[str, Any] = field(default_factory=dict)
    available_memory_bytes: int = 0
    peak_memory_bytes: int = 0
    seconds_per_step: float = 0.0
    predicted_seconds: float = 0.0
    predicted_finish: float = 0.0
    halvings: list[dict[str, Any]] = field(default_factory=list)
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    mix: list[list[int]] = field(default_factory=list)
    in_turn: bool = False
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def auto_epochs(n_rows: int) -> int:
    """3 passes, more for a small set so that it is seen at least 100 times, at most 25 (OpenAI's published rule)."""
    return min(25, max(3, math.ceil(100 / n_rows)))


def auto_batch_size(n_rows: int) -> int:
    """8 rows a step, fewer when that would leave less than about five steps an epoch."""
    return max(1, min(8, n_rows // 5))


def resolve(
    spec: JobSpec,
    groups: Sequence[Group],
    valid: Sequence[Group],
    card: TunerCard,
    *,
    dtype: str,
    path: str = "plain",
    teacher_path: str = "",
    quantization: str = "none",
    threads: int,
    context: int,
    parameters: int,
    trainable: int,
    versions: dict[str, str],
    lr_factor: float = 1.0,
) -> Plan:
    """The plan of a job before anything was measured. Raises SpecError if nothing is left to train on.

    card: the tuner's. lr_factor: the objective's, on the tuner's default learning rate.
    """
    n = len(groups)
    if n == 0:
        raise SpecError("No training row is left (see the notes on dropped rows).", code="invalid_n_examples")
    epochs = auto_epochs(n) if spec.n_epochs == "auto" else spec.n_epochs
    batch = auto_batch_size(n) if spec.batch_size == "auto" else spec.batch_size
    multiplier = 1.0 if spec.learning_rate_multiplier == "auto" else spec.learning_rate_multiplier
    rate = card.default_lr * lr_factor if spec.learning_rate == "auto" else spec.learning_rate
    total = math.ceil(n / batch) * epochs
    mix: list[list[int]] = []
    if spec.mix is not None and isinstance(groups, JoinedGroups):
        mix = [list(pair) for pair in zip(groups.counts, quotas(groups.counts, spec.mix), strict=True)]
    plan = Plan(
        n_rows=n,
        n_valid_rows=len(valid),
        n_tokens=int(sizes(groups)[:, TOKENS].sum()),
        n_epochs=epochs,
        batch_size=batch,
        total_steps=total,
        learning_rate=rate * multiplier,
        learning_rate_multiplier=multiplier,
        seed=spec.seed if spec.seed is not None else 0,
        dtype=dtype,
        path=path,
        teacher_path=teacher_path,
        quantization=quantization,
        threads=threads,
        micro_batch_tokens=MICRO_BATCH_TOKENS if spec.micro_batch_tokens == "auto" else spec.micro_batch_tokens,
        eval_every=max(1, total // 10) if spec.eval_every == "auto" else spec.eval_every,
        max_length=context if spec.max_length == "auto" else min(spec.max_length, context),
        parameters=parameters,
        trainable_parameters=trainable,
        checkpointing="none" if spec.checkpointing == "auto" else spec.checkpointing,
        mix=mix,
        in_turn=bool(mix) and spec.mix is not None and spec.mix.order == "in_turn",
        versions=versions,
    )
    return replace(plan, n_tokens=round(mean_of_epochs(plan, sizes(groups)[:, TOKENS]))) if mix else plan


def mean_of_epochs(plan: Plan, values: npt.NDArray[Any]) -> float:
    """The sum over an epoch's rows of `values` [rows], the mean of all epochs where they differ."""
    epochs = range(plan.n_epochs if plan.in_turn else 1)
    return sum(float(values[epoch_rows(plan, e)].sum()) for e in epochs) / len(epochs)


def epoch_rows(plan: Plan, epoch: int) -> npt.NDArray[np.int64]:
    """[n_rows] the rows of an epoch (0-based) in their order; of several files as places in all of them together."""
    files = tuple((n, quota) for n, quota in plan.mix)
    if plan.in_turn:
        return rows_in_turn(files, plan.seed, epoch, plan.n_epochs)
    places = order(plan.seed, epoch, plan.n_rows)
    return mixed_rows(files, plan.seed, epoch)[places] if files else places


def step_rows(plan: Plan, step: int) -> list[int]:
    """Row indices of one step (1-based), exactly batch_size of them but in an epoch's last step."""
    per_epoch = math.ceil(plan.n_rows / plan.batch_size)
    epoch, k = divmod(step - 1, per_epoch)
    rows = epoch_rows(plan, epoch)[k * plan.batch_size : (k + 1) * plan.batch_size]
    return rows.tolist()


Where = Literal["train", "valid"]


def micro_tokens(plan: Plan, step: int, where: Where = "train") -> int:
    """Tokens of a micro-batch in the training, or the validation after it, of one step: obeys the halvings."""
    moment = (step, where)  # "train" comes before "valid" in the alphabet as in a step
    sizes = [h["micro_batch_tokens"] for h in plan.halvings if (h["step"], h["where"]) <= moment]
    return min([plan.micro_batch_tokens, *sizes])


def rate_factor(plan: Plan, step: int) -> float:
    """What the roll-backs made of the learning rate: a factor from the step after each on."""
    return math.prod(r["lr_factor"] for r in plan.rollbacks if step > r["to"])


def valid_rows(plan: Plan, step: int, n: int) -> list[int]:
    """The n validation rows looked at in this step: a window that moves through the file."""
    total = plan.n_valid_rows
    start = (step // plan.eval_every - 1) * n % max(total, 1)
    return [(start + i) % total for i in range(min(n, total))]
