"""What a method against forgetting is: a second objective on rows of its own, or a pull on the parameters. Or both.

Rows: the loop runs them like the job's, in micro-batches of the same size, and divides by their own weight. A pull is
added once a step to the gradients, in closed form, after the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from tunewright.core.events import EventWriter
from tunewright.core.example import Group
from tunewright.models.policy import Policy
from tunewright.objectives.base import Objective
from tunewright.ops.runtime import derive_seed
from tunewright.ops.types import Batch, Term
from tunewright.train.shuffle import order
from tunewright.tuners.base import Tuner

CHUNK = 1 << 22  # numbers that are worked on at once, so that a pull takes little memory
PREFIX = "retain_"  # of a method's number in the events


@dataclass(frozen=True)
class RetainCard:
    """The capability row.

    rows: whether it needs a file of retained rows: `required`, `optional` (without one it works on the step's own
    rows) or `none`. needs_reference: whether it compares with the policy at step 0. copies: float32 numbers that it
    keeps for each trained parameter.
    """

    title: str
    rows: str
    needs_reference: bool = False
    copies: int = 0


class Options(BaseModel):
    """Base of every option block: unknown options are refused."""

    model_config = ConfigDict(extra="forbid")


class Compared(Protocol):
    """The policy at step 0 as a KL compares with it (train/reference.py)."""

    model: nn.Module

    def hidden(self, batch: Batch) -> Tensor: ...

    def scores(self, batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class Given:
    """What a job gives its methods before step 1, while the parameters are what they start from.

    objective: the plain objective of the model's head (SFT for a language model). rows: the retained rows, empty where
    there is no file. folder: the method's own in the run folder, for what must be measured once only.
    """

    seed: int
    batch_size: int
    tuner: Tuner
    policy: Policy
    objective: Objective
    rows: Sequence[Group]
    reference: Compared | None
    folder: Path
    events: EventWriter
    stop: Callable[[], bool]


class Retain:
    """One method. A subclass overrides what it needs: `begin`, and either `weights` and the call, or `pull`.

    key: its name in this job; `retain_<key>` is its number in the metrics events. rows: its own, or empty.
    n: how many of them it takes in each step.
    """

    card: ClassVar[RetainCard]
    Options: ClassVar[type[BaseModel]] = Options
    rows: Sequence[Group] = ()
    n: int = 0

    def __init__(self, options: Any, key: str = "") -> None:
        self.options = options
        self.key = key

    @property
    def term(self) -> str:
        return f"{PREFIX}{self.key}"

    def begin(self, given: Given) -> None:
        """Once in an attempt, before step 1 and before a checkpoint is loaded. What it leaves is a function of the
        job's start, so a checkpoint holds nothing of it."""

    def draw(self, step: int, groups: Sequence[Group]) -> Sequence[Group]:
        """The rows that it looks at in a step (1-based) whose own rows are `groups`; none for a pull.

        Retained rows come in turn, n a step, each once before any comes again: a function of (seed, step).
        """
        if not len(self.rows):
            return groups if self.card.rows == "optional" else ()
        return [self.rows[i] for i in self._numbers(step)]

    def weights(self, batch: Batch) -> dict[str, float]:
        """As an objective's."""
        return {}

    def __call__(self, policy: Policy, batch: Batch, stats: Any = None) -> dict[str, Term]:
        """As an objective's."""
        return {}

    def pull(self) -> float | None:
        """Add the gradient of a penalty to the parameters that have one in this step; returns the penalty, or None."""
        return None

    def take(self, given: Given, share: float) -> None:
        """Keep the retained rows, `share` of them in each step for each row of the job's."""
        self._seed = derive_seed("retain", self.key, given.seed)
        self.rows, self.n = given.rows, max(1, round(share * given.batch_size))

    def _numbers(self, step: int) -> list[int]:
        first, n = (max(step, 1) - 1) * self.n, len(self.rows)
        return [int(order(self._seed, i // n, n)[i % n]) for i in range(first, first + self.n)]


def snapshot(tuner: Tuner) -> dict[str, Tensor]:
    """A copy of everything that is trained, as it is now."""
    return {name: p.detach().clone() for name, p in tuner.trainable().items()}


@torch.no_grad()
def pull_back(
    parameters: dict[str, nn.Parameter], start: dict[str, Tensor], factor: float, importance: dict[str, Tensor] | None
) -> float:
    """factor / 2 * sum_i F_i (theta_i - start_i)^2, its gradient factor * F_i (theta_i - start_i) added to theta's.

    importance: F, or None for ones. A parameter without a gradient is left alone: it does not train in this step.
    """
    values = []
    for name, p in parameters.items():
        if p.grad is None:
            continue
        tensors = [p.detach(), start[name], p.grad, *([importance[name]] if importance is not None else [])]
        for theta, theta_0, grad, *f in zip(*(_rows(t) for t in tensors), strict=True):
            away = theta - theta_0
            pulled = away * f[0] if f else away
            values.append(torch.sum(away * pulled, dtype=torch.float64))
            grad.add_(pulled, alpha=factor)
    return 0.5 * factor * float(torch.stack(values).sum()) if values else 0.0


def _rows(t: Tensor) -> tuple[Tensor, ...]:
    """Views of about CHUNK numbers each."""
    if t.ndim == 0:
        return (t,)
    return t.split(max(1, CHUNK * t.shape[0] // max(t.numel(), 1)))
