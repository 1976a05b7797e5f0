"""GRPO: of several answers to a prompt, those with more reward than the others become likelier. No value model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from tunewright.objectives import rollouts
from tunewright.objectives.base import ObjectiveCard, TokenModel
from tunewright.objectives.rollouts import ADVANTAGE, GroupOptions, Numbers, Rolled, with_old
from tunewright.ops import segments
from tunewright.ops.types import Batch, Term

SMALL = 1e-4


class GRPO:
    """loss = mean of -min(r_t A, clip(r_t, 1 - low, 1 + high) A) + c k3_t over the answers' tokens t.

    A = (R - mean) / (std + 1e-4) over the rewards R of a prompt's answers (Shao et al. 2024, arXiv 2402.03300,
    section 4.1; the sample's standard deviation, as in TRL), without the division with scale_rewards false (Liu et al.
    2025, arXiv 2503.20783). r_t = p(y_t) / p_before(y_t); k3: of rollouts.py, against the policy at step 0.
    aggregation: `token`, the mean over all tokens of the step (Yu et al. 2025, arXiv 2503.14476, equation 8);
    `sequence`, the mean over answers of each one's mean (the GRPO paper's); `constant`, the sum over tokens for each
    max_completion_tokens of an answer (Liu et al. 2025). Groups whose rewards are all equal do not enter.
    Terms: `loss`, without the k3 part, which is `penalty`; with coef 0 means over tokens: `accuracy`, whether the token
    is the most likely one; `entropy`, - log p of what was drawn; `clip_share`; `kl`, of k3.
    """

    class Options(GroupOptions):
        kl_coefficient: float = Field(
            0.04, ge=0, le=10, description="how much is paid for each nat away from the start; 0: no reference"
        )
        clip_low: float = Field(0.2, gt=0, le=1, description="how far a token's ratio may fall below 1")
        clip_high: float = Field(0.2, gt=0, le=10, description="how far it may rise above 1")
        scale_rewards: bool = Field(True, description="divide by the standard deviation of the group's rewards")
        aggregation: Literal["token", "sequence", "constant"] = Field(
            "token", description="what the loss is a mean over: tokens, answers, or answers at their full length"
        )

    card: ClassVar[ObjectiveCard] = ObjectiveCard(
        title="Group relative policy optimisation (GRPO)",
        shapes=("prompt",),
        group_size=0,
        needs_reference=True,
        needs_rollouts=True,
        required=("grader",),
        openai_method="reinforcement",
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
        return {"logp"} if self.options.updates > 1 else set()

    @property
    def n_answers(self) -> int:
        return self.options.group_size

    def credit(self, groups: Sequence[Sequence[Rolled]]) -> list[list[Numbers]]:
        found = []
        for group in groups:
            advantage_G = self.advantages(torch.tensor([x.reward for x in group], dtype=torch.float64))
            numbers = ({ADVANTAGE: rollouts.spread(a, x.n)} for x, a in zip(group, advantage_G, strict=True))
            found.append([with_old(x, own) for x, own in zip(group, numbers, strict=True)])
        return found

    def advantages(self, rewards_G: Tensor) -> Tensor:
        """[G] of a group's rewards."""
        centred_G = rewards_G - rewards_G.mean()
        return centred_G / (rewards_G.std() + SMALL) if self.options.scale_rewards else centred_G

    def weights(self, batch: Batch) -> dict[str, float]:
        tokens, n = float(batch.weights_T.sum()), float(len(rollouts.answers(batch)[0]))
        of_loss = {"token": tokens, "sequence": n, "constant": n * self.options.max_completion_tokens}
        shown = dict.fromkeys(("accuracy", "entropy", "clip_share"), tokens)
        known = {"penalty": of_loss[self.options.aggregation], "kl": tokens} if self.card.needs_reference else {}
        return {"loss": of_loss[self.options.aggregation], **shown, **known}

    def __call__(self, policy: TokenModel, batch: Batch, stats: Any = None) -> dict[str, Term]:
        o, weight = self.options, self.weights(batch)["loss"]
        known = self.card.needs_reference
        reference_T = rollouts.reference_logp(self.reference, batch) if known else None
        got = policy.token_stats(batch, want={"logp", "correct"})
        logp_T = got["logp"]
        ratio_T = (logp_T - rollouts.old_logp(batch, logp_T)).exp()
        loss_T, clipped_T = rollouts.clipped(ratio_T, batch.per_token[ADVANTAGE], o.clip_low, o.clip_high)
        shown = {"accuracy": got["correct"], "entropy": -logp_T, "clip_share": clipped_T}
        terms = {"loss": Term(self._total(loss_T, batch), weight)}
        if reference_T is not None:
            far_T = rollouts.k3(logp_T, reference_T)
            terms["penalty"] = Term(self._total(far_T, batch), weight, o.kl_coefficient)
            shown["kl"] = far_T
        return {**terms, **rollouts.token_means(batch, **shown)}

    def report(self, means: dict[str, float]) -> dict[str, float]:
        return {name: means[name] for name in ("kl", "entropy", "clip_share") if name in means}

    def _total(self, values_T: Tensor, batch: Batch) -> Tensor:
        """The sum of a loss by token, which the loop divides by weights()."""
        rows_N, n_N = rollouts.answers(batch)
        sums_N = segments.sums(values_T * batch.weights_T, batch)[rows_N]
        return (sums_N / n_N).sum() if self.options.aggregation == "sequence" else sums_N.sum()
