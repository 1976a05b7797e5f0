"""What the objectives over preference pairs share: log-probabilities of the two answers, rewards, metrics.

A pair's answers y_w (preferred) and y_l (rejected) follow the same prompt x. An objective makes a loss of
log p(y_w | x) and log p(y_l | x), summed over each answer's tokens with their loss weights; the step's loss is the mean
over its pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tunewright.objectives.base import ObjectiveCard, TokenModel
from tunewright.ops import segments
from tunewright.ops.types import Batch, Term

REWARDS = ("chosen_reward", "rejected_reward", "reward_margin", "reward_accuracy")
LOGPS = ("chosen_logp", "rejected_logp")


@dataclass(frozen=True)
class Answers:
    """[P, 2] float64 each, the preferred answer first. logp: sums over the answers' tokens; n: of the loss weights.

    reference: logp under the reference, zeros for an objective without one.
    """

    logp: Tensor
    n: Tensor
    reference: Tensor

    @property
    def mean_logp(self) -> Tensor:
        return self.logp / self.n

    @property
    def ratio(self) -> Tensor:
        """log p(y | x) - log p_reference(y | x)."""
        return self.logp - self.reference


@dataclass(frozen=True)
class Compared:
    """loss: [P]. rewards: [P, 2], how much the objective holds each answer to be worth."""

    loss: Tensor
    rewards: Tensor


class Pairwise:
    """Loss and metrics of pairs; a subclass says in `compare` what a pair's loss is.

    Terms: `loss`; with coef 0 `accuracy`, the weighted share of the preferred answers' tokens whose most likely
    prediction is the token; the means over pairs of both rewards, of their difference (`reward_margin`), of whether the
    preferred one's is larger (`reward_accuracy`) and of both log-probabilities. A pair one of whose answers has no
    supervised token counts nowhere.
    """

    card: ClassVar[ObjectiveCard]
    reference: TokenModel | None = None

    def __init__(self, options: Any) -> None:
        self.options = options

    def compare(self, answers: Answers) -> Compared:
        raise NotImplementedError

    def weights(self, batch: Batch) -> dict[str, float]:
        n_P2 = _counted(batch)[1]
        return {
            "loss": float(len(n_P2)),
            "accuracy": float(n_P2[:, 0].sum()),
            **dict.fromkeys((*REWARDS, *LOGPS), float(len(n_P2))),
        }

    def __call__(self, policy: TokenModel, batch: Batch, stats: Any = None) -> dict[str, Term]:
        rows_P2, n_P2 = _counted(batch)
        reference_P2 = self._reference_logp(batch, rows_P2)
        got = policy.token_stats(batch, want={"logp", "correct"})
        logp_P2 = segments.sums(got["logp"] * batch.weights_T, batch)[rows_P2]
        found = self.compare(Answers(logp_P2, n_P2, reference_P2))
        correct_P2 = segments.sums(got["correct"] * batch.weights_T, batch)[rows_P2]
        rewards_P2, logp_P2 = found.rewards.detach(), logp_P2.detach()
        margin_P = rewards_P2[:, 0] - rewards_P2[:, 1]
        shown = {
            "accuracy": correct_P2[:, 0].detach(),
            "chosen_reward": rewards_P2[:, 0],
            "rejected_reward": rewards_P2[:, 1],
            "reward_margin": margin_P,
            "reward_accuracy": (margin_P > 0).double(),
            "chosen_logp": logp_P2[:, 0],
            "rejected_logp": logp_P2[:, 1],
        }
        weights = self.weights(batch)
        return {
            "loss": Term(found.loss.sum(), weights["loss"]),
            **{name: Term(x.sum(), weights[name], coef=0.0) for name, x in shown.items()},
        }

    def report(self, means: dict[str, float]) -> dict[str, float]:
        return {name: means[name] for name in (*REWARDS, *LOGPS)}

    def _reference_logp(self, batch: Batch, rows_P2: Tensor) -> Tensor:
        """[P, 2] under the reference; asked for before the policy, so that a switched adapter is switched once."""
        if not self.card.needs_reference:
            return segments.sums(batch.weights_T, batch)[rows_P2] * 0.0
        assert self.reference is not None, "this objective needs the policy at step 0"
        logp_T = self.reference.token_stats(batch, want={"logp"})["logp"]
        return segments.sums(logp_T * batch.weights_T, batch)[rows_P2]


def _counted(batch: Batch) -> tuple[Tensor, Tensor]:
    """([P, 2] the segments of the pairs that count, [P, 2] the sums of their tokens' loss weights)."""
    rows_P2 = segments.pairs(batch)
    n_P2 = segments.sums(batch.weights_T, batch)[rows_P2]
    counts_P = (n_P2 > 0).all(1)
    return rows_P2[counts_P], n_P2[counts_P]
