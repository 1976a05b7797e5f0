"""What an objective is: a pure function from (policy, batch) to terms, with one capability row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from tunewright.ops.types import Batch, Term


@dataclass(frozen=True)
class ObjectiveCard:
    """The capability row. shapes: data shapes it can use; group_size: examples in a group (0 = any).

    head: which of the model's outputs it trains: `lm` (the next token), or one for whole rows (models/heads.py).
    lr_factor: what the tuner's default learning rate, which is made for supervised training, is multiplied by.
    beside: further shapes that validation files and the files of `mix` may have.
    required: options that must be given; either: options of which one must be. One with the option `teacher` compares
    with that model, which it is given as its attribute `teacher`. asks: who makes its rows first: a `teacher` on
    another server that answers them (train/asking.py), or a `judge` of two answers, there or here (train/judging.py).
    needs_rollouts: its rows are prompts that the model answers itself (objectives/rollouts.py).
    """

    title: str
    shapes: tuple[str, ...]
    group_size: int = 1
    needs_reference: bool = False
    needs_rollouts: bool = False
    required: tuple[str, ...] = ()
    either: tuple[str, ...] = ()
    asks: str = ""
    openai_method: str | None = None
    head: str = "lm"
    lr_factor: float = 1.0
    beside: tuple[str, ...] = ()


class Options(BaseModel):
    """Base of every option block: unknown options are refused."""

    model_config = ConfigDict(extra="forbid")


class TokenModel(Protocol):
    """What an objective may ask of the model: quantities per target token or per row, never [T, V] logits."""

    def token_stats(
        self, batch: Batch, want: set[str], value: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, Tensor]: ...

    def divergence(self, batch: Batch, teacher: Any, kind: str) -> Tensor: ...

    def compare(
        self, batch: Batch, teacher: Any, want: set[str], kind: str, beta: float = 0.5, temperature: float = 1.0
    ) -> dict[str, Tensor]: ...

    def scores(self, batch: Batch) -> Tensor: ...


class Objective(Protocol):
    """`weights` gives each term's weight from the batch alone, so that the loop can divide before the first forward.

    It must equal the weights of the terms that the call returns. `metrics` (optional detached sums for charts, each
    with its own weight) come back through `Term`s with coef 0. An optional `report(means)` makes further metrics of
    the terms' means, which training and validation write into their events.
    An optional `stats(policy, batches)` looks at a whole step without gradients; what it returns is `stats` below.
    One whose card says `needs_reference` is given the policy at step 0 as its attribute `reference`.
    """

    card: ClassVar[ObjectiveCard]
    Options: ClassVar[type[BaseModel]]

    def __init__(self, options: Any) -> None: ...

    def weights(self, batch: Batch) -> dict[str, float]: ...

    def __call__(self, policy: TokenModel, batch: Batch, stats: Any = None) -> dict[str, Term]: ...
