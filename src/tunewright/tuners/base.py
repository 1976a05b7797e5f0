"""What a tuner is: the few moments at which it may act, with one capability row. Defaults do nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn


@dataclass(frozen=True)
class TunerCard:
    """The capability row.

    artefact: `adapter`, `delta`, `weights` or `recipe`. default_lr: learning rate when the job says `auto`.
    float32_base: load the base in float32 (it is what is trained); else in the dtype of the computation.
    works_on_nf4: the base's linear layers may be quantised (nf4 or int8): the tuner trains none of them itself.
    needs_data: what is trained is chosen in prepare(), by the gradients of some rows.
    """

    title: str
    artefact: str
    mergeable: bool
    identity_at_start: bool
    works_on_nf4: bool
    default_lr: float
    float32_base: bool = False
    needs_data: bool = False


class Options(BaseModel):
    """Base of every option block: unknown options are refused."""

    model_config = ConfigDict(extra="forbid")


class Tuner:
    """One method of deciding what is trained. A subclass overrides the moments it needs; there is one level only
    (and at most one class between, for what several share: PeftTuner, Full, WholeTensors, Entries; SoftPrompt is a
    PeftTuner).

    Order in a run: [refuse], attach (once), [load (continuing from an artefact)], [prepare], begin, then per step
    before_step, penalty (added once a step), on_gradients (after the last backward, before clipping), update and
    after_step (not when the update is skipped); save at checkpoints.
    """

    card: ClassVar[TunerCard]
    Options: ClassVar[type[BaseModel]] = Options

    def __init__(self, options: Any) -> None:
        self.options = options

    @property
    def n_virtual(self) -> int:
        """Tokens that the tuner puts in front of every row: they take room in a micro-batch and of the context."""
        return 0

    def refuse(self, model: nn.Module) -> None:
        """Raise SpecError if the tuner cannot train such a model: asked before the weights are loaded.

        model: its modules without weights (on meta tensors), which nobody needs afterwards.
        """

    def attach(self, model: nn.Module, seed: int) -> nn.Module:
        """Prepare `model` (in place) for training: add modules, set requires_grad. Returns the model to run."""
        raise NotImplementedError

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything that is trained, in a stable order."""
        raise NotImplementedError

    def at_once(self) -> dict[str, nn.Parameter]:
        """Those of trainable() that have gradients and optimizer state at the same time: what memory must hold."""
        return self.trainable()

    def begin(self, total_steps: int, steps_per_epoch: int) -> None:
        """Once, before the first step and before a checkpoint is loaded: how long the job is."""

    def prepare(self, gradients: Callable[[int], Iterator[None]]) -> None:
        """Where the card says `needs_data`: once in a job, after attach and before trainable() is asked for.

        gradients(n): goes through n rows in turn; at each, the gradient of that row's summed loss has been added to
        the model's parameters, which it leaves to its caller to drop.
        """

    def before_step(self, step: int) -> None:
        """Before the step's first forward. step: 1-based. May come again for the same step, which then starts anew."""

    def on_gradients(self, step: int) -> None:
        """After the step's backward, before clipping."""

    @contextmanager
    def all_trained(self) -> Iterator[None]:
        """Within this every parameter of trainable() gets a gradient, one that trains in other steps only, too."""
        yield

    def penalty(self) -> Tensor | None:
        """A scalar added once a step to the loss, or None."""
        return None

    def update(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """The optimizer's update, after clipping. Overridden where it must not move or remember everything."""
        optimizer.step()

    def after_step(self, step: int) -> None:
        """After the optimizer's update."""

    def state(self) -> dict[str, Any]:
        """JSON-able state beyond weights and optimizer (masks' seeds, scores …)."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None: ...

    def tensors(self) -> dict[str, Tensor]:
        """What resuming needs and JSON should not hold (scores, masks of single weights), not part of the artefact."""
        return {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what tensors() gave; called after load() and load_state()."""

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within this, the model computes exactly what the base does."""
        raise NotImplementedError
        yield

    def save(self, folder: Path, base: str) -> None:
        """Write the artefact's files (PEFT's formats on disk). base: the base model's name or folder."""
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        """Set the trained weights from an artefact written by save(). Raises CheckpointError if they do not fit."""
        raise NotImplementedError

    def merge(self) -> nn.Module:
        """The plain model with what was trained folded into its weights."""
        raise NotImplementedError


def parameter_bytes(parameters: dict[str, nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters.values())


def to_float32(parameters: dict[str, nn.Parameter]) -> None:
    """Trained weights are kept in float32 (master weights); autocast brings them down for the products."""
    for p in parameters.values():
        p.data = p.data.to(torch.float32)
