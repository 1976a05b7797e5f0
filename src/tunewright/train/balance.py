"""The routers' load-balancing loss as one more term of any objective, exact however a step is cut.

L = E sum_e f_e P_e: E experts, f_e the tokens that chose expert e and P_e the mean of its probabilities, both over all
layers and tokens of the step (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6, as transformers computes it; in
perfect balance it is the number of experts a token gets). It is a product of two means over the step, so the sum over
micro-batches of a micro-batch's own L would be another loss. But f has no gradient. A pass without gradient counts it
over the whole step; with f fixed L is linear in the probabilities, and a sum of total = E sum_e f_e sum_t p_e(t) over
weight = layers * tokens. A step of one micro-batch needs no such pass, unless it has noise, which the pass has not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunewright.core.errors import SpecError
from tunewright.models.experts import Routers
from tunewright.models.layouts import PACKED
from tunewright.models.policy import Policy
from tunewright.objectives.base import Objective
from tunewright.ops.noise import dropouts_of
from tunewright.ops.types import Batch, Term

NAME = "router_loss"


def balanced(objective: Any, policy: Policy, coefficient: float) -> Any:
    """The objective with the term, or the objective itself where the coefficient is 0.

    Raises SpecError for a model without routers, or one that runs padded.
    """
    return Balanced(objective, policy, coefficient) if coefficient else objective


@dataclass(frozen=True)
class Seen:
    """own: what the objective's own `stats` found. shares_E: f of the step, None where the batch itself says it."""

    own: Any
    shares_E: Tensor | None


class Balanced:
    """An objective and the term `router_loss`. Everything else is the objective's."""

    def __init__(self, objective: Objective, policy: Policy, coefficient: float) -> None:
        if policy.layout != PACKED:
            raise SpecError(
                "router_loss: this model runs padded, and its routers would count the padding. Set it to 0.",
                param="router_loss",
            )
        self.objective, self.coefficient = objective, coefficient
        self.card, self.options = objective.card, getattr(objective, "options", None)
        self.report = getattr(objective, "report", None)
        self._routers = Routers(policy.model)

    def weights(self, batch: Batch) -> dict[str, float]:
        return {**self.objective.weights(batch), NAME: float(self._routers.n * batch.n_tokens)}

    def stats(self, policy: Policy, batches: Sequence[Batch]) -> Seen:
        """The step's shares, in a pass without gradient where it takes one."""
        own = getattr(self.objective, "stats", None)
        found = None if own is None else own(policy, batches)
        noisy = policy.embedding_noise is not None or bool(dropouts_of(policy.model))
        if not torch.is_grad_enabled() or (len(batches) == 1 and not noisy):
            return Seen(found, None)
        counts = []
        with torch.no_grad():
            for batch in batches:
                with self._routers.watched() as logits:
                    policy.hidden(batch)
                counts.append(self._counts(logits))
        return Seen(found, torch.stack(counts).sum(0) / sum(self._routers.n * b.n_tokens for b in batches))

    def __call__(self, policy: Policy, batch: Batch, stats: Seen | None = None) -> dict[str, Term]:
        with self._routers.watched() as logits:
            terms = self.objective(policy, batch, stats.own if stats else None)
        weight = float(self._routers.n * batch.n_tokens)
        shares_E = stats.shares_E if stats is not None and stats.shares_E is not None else self._counts(logits) / weight
        sums_E = torch.stack([z.float().softmax(-1).sum(0) for z in logits]).sum(0)
        total = len(shares_E) * (shares_E * sums_E).sum()
        return {**terms, NAME: Term(total, weight, self.coefficient)}

    @torch.no_grad()
    def _counts(self, logits: Sequence[Tensor]) -> Tensor:
        """[E] how often each expert was chosen, over all layers."""
        experts = logits[0].shape[-1]
        chosen = [z.float().softmax(-1).topk(self._routers.chosen, dim=-1).indices for z in logits]
        return torch.stack([c.reshape(-1).bincount(minlength=experts) for c in chosen]).sum(0).float()
