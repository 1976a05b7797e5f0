"""The reference: the policy at step 0 of this job, as an objective may compare with it. Never with a gradient.

A fresh adapter is switched off for the time of a pass: no second model. Everything else (weights, deltas, an adapter
that goes on from another) is loaded twice, and the frozen copy is the reference; the preflight counts it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from tunewright.models.policy import Policy
from tunewright.ops.types import Batch
from tunewright.tuners.base import Tuner


class Reference:
    """The policy at step 0, as objectives and Policy.divergence ask for it.

    at_start: within it `policy` computes what step 0 did. how: what it is, for the job's events.
    """

    def __init__(
        self,
        policy: Policy,
        at_start: Callable[[], AbstractContextManager[None]] = nullcontext,
        how: str = "a second copy of the model",
    ) -> None:
        self.how = how
        self._policy = policy
        self._at_start = at_start
        self.model: nn.Module = policy.model

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """[T, D], as Policy.hidden."""
        with self._at_start():
            return self._policy.hidden(batch)

    @torch.no_grad()
    def token_stats(
        self, batch: Batch, want: set[str], value: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """{name: [T]}, as Policy.token_stats."""
        with self._at_start():
            return self._policy.token_stats(batch, want, value)

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        """[S, labels], as Policy.scores."""
        with self._at_start():
            return self._policy.scores(batch)


def find_reference(tuner: Tuner, policy: Policy, continues: bool, copy: Callable[[], Policy]) -> Reference:
    """The reference of a job. continues: it starts from an adapter or delta. copy: loads the policy at step 0 again."""
    if tuner.card.artefact == "adapter" and not continues:
        return Reference(policy, tuner.off, "the same model with its fresh adapter off")
    return Reference(copy())
