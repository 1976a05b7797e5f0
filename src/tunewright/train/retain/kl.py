"""KL to the start: the model's predictions stay near those that it made before step 1 (learning without forgetting)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tunewright.models.policy import Policy
from tunewright.ops.logprob import KINDS, divergence_of
from tunewright.ops.types import Batch, Term
from tunewright.train.retain import base
from tunewright.train.retain.base import Given, RetainCard

VALUES = ("regress", "reward")  # heads that give a number


class KL(base.Retain):
    """Adds coefficient * (mean divergence from the policy at step 0, in nats a supervised token) to the loss.

    Over the whole vocabulary, not only the true token. On retained rows (file), else on the step's own. Li & Hoiem
    2016, arXiv 1606.09282, at temperature 1. With a head for rows: between its class distributions, where a row may
    have several the sum over the classes; between values v and v_0 (v - v_0)^2 / 2, the KL of two normal distributions
    of variance 1.
    """

    class Options(base.Options):
        file: str | None = Field(
            None, description="retained rows: a path (command line) or a file id (HTTP); empty: the training rows"
        )
        coefficient: float = Field(1.0, gt=0, le=1000, description="factor of the mean divergence")
        share: float = Field(
            0.25, gt=0, le=16, description="retained rows in a step, for each row of batch_size; only with a file"
        )
        kind: Literal["forward", "reverse", "jsd"] = Field(
            "forward",
            description="forward: KL(start || model), keeps all that was likely; reverse; jsd, between both",
        )

    card: ClassVar[RetainCard] = RetainCard(title="KL to the start", rows="optional", needs_reference=True)

    def begin(self, given: Given) -> None:
        self._reference: Any = given.reference
        self._head = given.objective.card.head
        if len(given.rows):
            self.take(given, self.options.share)

    def weights(self, batch: Batch) -> dict[str, float]:
        return {self.term: float(batch.weights_T.sum()) if self._head == "lm" else float(batch.n_segments)}

    def __call__(self, policy: Policy, batch: Batch, stats: Any = None) -> dict[str, Term]:
        kind = KINDS[self.options.kind]
        if self._head == "lm":
            far_N = policy.divergence(batch, self._reference, kind) * batch.weights_T
        else:
            reference_SL = self._reference.scores(batch)
            far_N = self._of_rows(policy.scores(batch), reference_SL, kind)
        return {self.term: Term(far_N.sum(), self.weights(batch)[self.term], self.options.coefficient)}

    def _of_rows(self, scores_SL: Tensor, reference_SL: Tensor, kind: str) -> Tensor:
        """[S] nats."""
        if self._head in VALUES:
            return 0.5 * (scores_SL - reference_SL)[:, 0].square()
        if self._head == "multilabel":
            ours, theirs = (torch.stack([F.logsigmoid(x), F.logsigmoid(-x)], -1) for x in (scores_SL, reference_SL))
            return divergence_of(ours, theirs, kind).sum(-1)
        return divergence_of(torch.log_softmax(scores_SL, -1), torch.log_softmax(reference_SL, -1), kind)
