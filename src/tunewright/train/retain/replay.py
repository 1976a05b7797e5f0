"""Replay: rows of what must not be forgotten are learned in every step beside the job's own (experience rehearsal)."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from tunewright.models.policy import Policy
from tunewright.ops.types import Batch, Term
from tunewright.train.retain import base
from tunewright.train.retain.base import Given, RetainCard


class Replay(base.Retain):
    """Adds coefficient * (mean loss of the step's retained rows) to the loss. Two means: neither dilutes the other.

    Robins 1995 (Catastrophic forgetting, rehearsal and pseudorehearsal); for language models Scialom et al. 2022, arXiv
    2205.12393. The rows are learned by the plain objective of the model's head, whatever the job's own objective is.
    """

    class Options(base.Options):
        file: str | None = Field(None, description="retained rows: a path (command line) or a file id (HTTP)")
        coefficient: float = Field(1.0, gt=0, le=1000, description="factor of the retained rows' mean loss")
        share: float = Field(0.25, gt=0, le=16, description="retained rows in a step, for each row of batch_size")

    card: ClassVar[RetainCard] = RetainCard(title="Replay", rows="required")

    def begin(self, given: Given) -> None:
        self.objective = given.objective
        self.take(given, self.options.share)

    def weights(self, batch: Batch) -> dict[str, float]:
        return {self.term: self.objective.weights(batch)["loss"]}

    def __call__(self, policy: Policy, batch: Batch, stats: Any = None) -> dict[str, Term]:
        loss = self.objective(policy, batch)["loss"]
        return {self.term: Term(loss.total, loss.weight, self.options.coefficient)}
