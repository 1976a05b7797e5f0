"""RLOO: REINFORCE over whole answers, each one's reward measured against the mean of the others to the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tunewright.objectives import rollouts
from tunewright.objectives.base import ObjectiveCard, TokenModel
from tunewright.objectives.rollouts import ADVANTAGE, GroupOptions, Numbers, Rolled, with_old
from tunewright.ops import segments
from tunewright.ops.types import Batch, Term


class RLOO:
    """loss = mean over answers of -min(r A, clip(r, 1 - clip, 1 + clip) A), r = p(y | x) / p_before(y | x).

    A_i = R_i - mean of the R_j of the other answers to the prompt; R = reward - c (log p(y | x) - log p_reference(y |
    x)) (Ahmadian et al. 2024, arXiv 2402.14740, equations 2 and 8; with one update a step this is REINFORCE). Groups
    whose rewards are all equal do not enter.
    Terms: `loss`; with coef 0 `clip_share`, of answers, and means over tokens: `accuracy` and `entropy` as in GRPO;
    `kl`, of k3, where there is a reference.
    """

    class Options(GroupOptions):
        kl_coefficient: float = Field(
            0.05, ge=0, le=10, description="how much of the reward each nat away from the start costs; 0: no reference"
        )
        clip: float = Field(0.2, gt=0, le=1, description="how far an answer's ratio may go from 1")

    card: ClassVar[ObjectiveCard] = ObjectiveCard(
        title="REINFORCE leave-one-out (RLOO)",
        shapes=("prompt",),
        group_size=0,
        needs_reference=True,
        needs_rollouts=True,
        required=("grader",),
        lr_factor=0.1,
    )
    compares: ClassVar[bool] = True
    numbers: ClassVar[tuple[str, ...]] = (ADVANTAGE,)
    reference: TokenModel | None = None

    def __init__(self, options: Any) -> None:
        self.options = options
        if not options.kl_coefficient:
            self.card = replace(type(self).card, needs_reference=False)  # type: ignore[misc]

    @property
    def looks(self) -> set[str]:
        return {"logp", "reference"} if self.card.needs_reference else {"logp"} if self.options.updates > 1 else set()

    @property
    def n_answers(self) -> int:
        return self.options.group_size

    def credit(self, groups: Sequence[Sequence[Rolled]]) -> list[list[Numbers]]:
        found = []
        for group in groups:
            paid_G = leave_one_out(torch.stack([self._paid(x) for x in group]))
            numbers = ({ADVANTAGE: rollouts.spread(a, x.n)} for x, a in zip(group, paid_G, strict=True))
            found.append([with_old(x, own) for x, own in zip(group, numbers, strict=True)])
        return found

    def _paid(self, x: Rolled) -> Tensor:
        """The reward, less what the distance from the start costs."""
        far = 0.0 if x.logp is None or x.reference is None else float((x.logp - x.reference).sum())
        return torch.tensor(x.reward - self.options.kl_coefficient * far, dtype=torch.float64)

    def weights(self, batch: Batch) -> dict[str, float]:
        tokens, n = float(batch.weights_T.sum()), float(len(rollouts.answers(batch)[0]))
        known = {"kl": tokens} if self.card.needs_reference else {}
        return {"loss": n, "clip_share": n, "accuracy": tokens, "entropy": tokens, **known}

    def __call__(self, policy: TokenModel, batch: Batch, stats: Any = None) -> dict[str, Term]:
        rows_N, n_N = rollouts.answers(batch)
        reference_T = rollouts.reference_logp(self.reference, batch) if self.card.needs_reference else None
        got = policy.token_stats(batch, want={"logp", "correct"})
        logp_T, weights_T = got["logp"], batch.weights_T
        far_N = segments.sums((logp_T - rollouts.old_logp(batch, logp_T)) * weights_T, batch)[rows_N]
        advantage_N = segments.sums(batch.per_token[ADVANTAGE] * weights_T, batch)[rows_N] / n_N
        loss_N, clipped_N = rollouts.clipped(far_N.exp(), advantage_N, self.options.clip, self.options.clip)
        shown = {"accuracy": got["correct"], "entropy": -logp_T}
        if reference_T is not None:
            shown["kl"] = rollouts.k3(logp_T, reference_T)
        n = float(len(rows_N))
        return {
            "loss": Term(loss_N.sum(), n),
            "clip_share": Term(clipped_N.sum(), n, coef=0.0),
            **rollouts.token_means(batch, **shown),
        }

    def report(self, means: dict[str, float]) -> dict[str, float]:
        return {name: means[name] for name in ("kl", "entropy", "clip_share") if name in means}


def leave_one_out(rewards_G: Tensor) -> Tensor:
    """[G]: each reward less the mean of the others."""
    others_G = (rewards_G.sum() - rewards_G) / (len(rewards_G) - 1)
    return rewards_G - others_G
