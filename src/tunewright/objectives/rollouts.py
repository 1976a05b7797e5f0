"""What the objectives over rollouts share: a model answers prompts itself, its answers get rewards, and it learns from
them in the same step.

train/rollouts.py samples and grades; `credit` makes of the rewards what each token is worth, before the step; the loss
then reads that from the batch (`per_token`), so a step may be cut in any way. Every token of an answer has weight 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor

from tunewright.objectives import base
from tunewright.objectives.base import TokenModel
from tunewright.ops import segments
from tunewright.ops.types import Batch, Term

ADVANTAGE, OLD_LOGP = "advantage", "old_logp"
Numbers = dict[str, Tensor]  # of a completion's tokens, [n] each


class RolloutOptions(base.Options):
    """Options of every objective over rollouts."""

    grader: dict[str, Any] | None = Field(None, description="what gives the rewards, in OpenAI's words: {type: …}")
    max_completion_tokens: int = Field(256, ge=1, le=1 << 17, description="after which an answer is cut off")
    temperature: float = Field(
        1.0, gt=0, le=2, description="of the answers that are learned from; the loss is made for 1"
    )
    eval_samples: int = Field(1, ge=1, le=32, description="answers to each validation row")
    updates: int = Field(1, ge=1, le=16, description="optimizer updates with a step's answers; only later ones clip")


class GroupOptions(RolloutOptions):
    """Of those that compare the answers to one prompt with each other."""

    group_size: int = Field(8, ge=2, le=128, description="answers to each prompt")


@dataclass(frozen=True)
class Rolled:
    """A completion before the step trains on it. reward: what it got. n: its tokens.

    logp, reference, value: [n] float64, log-probabilities of its tokens under the policy and the reference, and what
    the value head expected before each of them; None where the objective does not look at it.
    """

    reward: float
    n: int
    logp: Tensor | None = None
    reference: Tensor | None = None
    value: Tensor | None = None


class OverRollouts(base.Objective, Protocol):
    """An objective over rollouts.

    looks: the fields of Rolled that credit() needs, filled in a pass without gradient. n_answers: to each prompt.
    numbers: what the loss needs of each token (`old_logp` may be missing). compares: whether a group whose rewards are
    all equal says nothing and is left out. One that has the attribute `value_head` is given a head (train/value.py).
    """

    options: Any
    compares: ClassVar[bool]
    numbers: ClassVar[tuple[str, ...]]

    @property
    def looks(self) -> set[str]: ...

    @property
    def n_answers(self) -> int: ...

    def credit(self, groups: Sequence[Sequence[Rolled]]) -> list[list[Numbers]]:
        """What each token of each completion of a step's groups is worth: at least `advantage`."""
        ...


def spread(value: Tensor | float, n: int) -> Tensor:
    """[n] float64 of one number."""
    return torch.full((n,), float(value), dtype=torch.float64)


def with_old(rolled: Rolled, numbers: Numbers) -> Numbers:
    """The numbers with the log-probabilities before the step's first update, where they were looked at."""
    return numbers if rolled.logp is None else {**numbers, OLD_LOGP: rolled.logp}


def old_logp(batch: Batch, logp_T: Tensor) -> Tensor:
    """[T] log-probabilities before the step's first update. They are the present ones where nobody kept them: with one
    update a step the ratio of both is exactly 1, and only its gradient counts."""
    return batch.per_token.get(OLD_LOGP, logp_T.detach())


def clipped(ratio: Tensor, advantage: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """(loss, whether the clipping took its gradient): -min(r A, clip(r, 1 - low, 1 + high) A), elementwise.

    Schulman et al. 2017 (arXiv 1707.06347, equation 7); two bounds: Yu et al. 2025 (arXiv 2503.14476, section 3.1).
    """
    plain, bound = ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage
    return -torch.minimum(plain, bound), (bound < plain).detach().double()


def k3(logp_T: Tensor, reference_T: Tensor) -> Tensor:
    """KL to the reference, estimated from a sampled token: e^d - d - 1, d = log p_reference - log p. Never below 0,
    unbiased (Schulman 2020, "Approximating KL divergence"; Shao et al. 2024, arXiv 2402.03300, equation 4)."""
    far_T = reference_T - logp_T
    return far_T.exp() - far_T - 1


def answers(batch: Batch) -> tuple[Tensor, Tensor]:
    """([N] the segments of the completions that have a token, [N] float64 how many)."""
    rows_N = segments.examples(batch)
    n_N = segments.sums(batch.weights_T, batch)[rows_N]
    return rows_N[n_N > 0], n_N[n_N > 0]


def token_means(batch: Batch, **values: Tensor) -> dict[str, Term]:
    """Terms for charts: means over all tokens."""
    n = float(batch.weights_T.sum())
    return {k: Term((x.detach() * batch.weights_T).double().sum(), n, coef=0.0) for k, x in values.items()}


def reference_logp(reference: TokenModel | None, batch: Batch) -> Tensor:
    """[T] under the reference; asked for before the policy, so that a switched adapter is switched once."""
    assert reference is not None, "this objective needs the policy at step 0"
    return reference.token_stats(batch, want={"logp"})["logp"]
