"""PPO: each token of an answer is worth what came of it beyond what a value head expected; kept close to the start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tunewright.objectives import rollouts
from tunewright.objectives.base import ObjectiveCard, TokenModel
from tunewright.objectives.rollouts import ADVANTAGE, OLD_LOGP, Numbers, Rolled, RolloutOptions
from tunewright.ops.types import Batch, Term

OLD_VALUE, RETURN, REFERENCE = "old_value", "return", "reference_logp"
SMALL = 1e-8


class PPO:
    """loss = mean over tokens of -min(r_t A_t, clip(r_t, 1 - clip, 1 + clip) A_t) + c_v v_t.

    r_t = p(y_t) / p_before(y_t), A_t the generalised advantage (gae) of the rewards -c (log p_before(y_t) - log
    p_reference(y_t)), to which the answer's last token adds the grader's (Ziegler et al. 2019, arXiv 1909.08593,
    section 2.2), with mean 0 and deviation 1 over the step's tokens. v_t = 1/2 max((V_t - R_t)^2, (V'_t - R_t)^2), R_t
    = A_t + V_t before, V' = V kept within value_clip of what it was (Schulman et al. 2017, arXiv 1707.06347, equations
    7 and 9; the value's clipping as in its authors' code).
    The value head reads hidden states without a gradient to them; checkpoints have it, the result does not.
    Terms: `loss`; `value`, v with coef c_v; with coef 0 means over tokens: `accuracy`, `entropy` and `kl` as in GRPO,
    `clip_share`.
    """

    class Options(RolloutOptions):
        reward_model: str | None = Field(None, description="an `ft:` reward model that gives the rewards")
        updates: int = Field(
            4, ge=1, le=16, description="optimizer updates with a step's answers; only later ones clip"
        )
        kl_coefficient: float = Field(0.05, ge=0, le=10, description="what each nat away from the start costs")
        gamma: float = Field(1.0, gt=0, le=1, description="what a reward is worth a token earlier")
        lam: float = Field(0.95, ge=0, le=1, description="of the advantages: 1 trusts rewards, 0 the value head")
        clip: float = Field(0.2, gt=0, le=1, description="how far a token's ratio may go from 1")
        value_clip: float = Field(0.2, gt=0, le=100, description="how far a value may move in a step")
        value_coefficient: float = Field(0.1, ge=0, le=10, description="factor of the value head's loss")

    card: ClassVar[ObjectiveCard] = ObjectiveCard(
        title="Proximal policy optimisation (PPO)",
        shapes=("prompt",),
        group_size=1,
        needs_reference=True,
        needs_rollouts=True,
        either=("grader", "reward_model"),
        lr_factor=0.1,
    )
    compares: ClassVar[bool] = False
    numbers: ClassVar[tuple[str, ...]] = (ADVANTAGE, OLD_VALUE, RETURN, REFERENCE)
    looks: ClassVar[set[str]] = {"logp", "reference", "value"}
    n_answers: ClassVar[int] = 1
    reference: TokenModel | None = None
    value_head: Callable[[Tensor], Tensor] | None = None  # [N, D] hidden states -> [N]; set when a job is put together

    def __init__(self, options: Any) -> None:
        self.options = options

    def credit(self, groups: Sequence[Sequence[Rolled]]) -> list[list[Numbers]]:
        found = [[self._numbers(x) for x in group] for group in groups]
        every_T = torch.cat([own[ADVANTAGE] for group in found for own in group])
        mean, deviation = every_T.mean(), every_T.std(correction=0) + SMALL
        return [[{**own, ADVANTAGE: (own[ADVANTAGE] - mean) / deviation} for own in group] for group in found]

    def _numbers(self, x: Rolled) -> Numbers:
        assert x.logp is not None and x.reference is not None and x.value is not None
        reward_n = -self.options.kl_coefficient * (x.logp - x.reference)
        reward_n[-1] += x.reward
        advantage_n = gae(reward_n, x.value, self.options.gamma, self.options.lam)
        return {
            ADVANTAGE: advantage_n,
            RETURN: advantage_n + x.value,
            OLD_VALUE: x.value,
            OLD_LOGP: x.logp,
            REFERENCE: x.reference,
        }

    def weights(self, batch: Batch) -> dict[str, float]:
        names = ("loss", "value", "accuracy", "entropy", "clip_share", "kl")
        return dict.fromkeys(names, float(batch.weights_T.sum()))

    def __call__(self, policy: TokenModel, batch: Batch, stats: Any = None) -> dict[str, Term]:
        assert self.value_head is not None, "this objective needs a value head"
        o, known, n = self.options, batch.per_token, self.weights(batch)["loss"]
        got = policy.token_stats(batch, {"logp", "correct"}, self.value_head)
        logp_T, value_T = got["logp"], got["value"]
        ratio_T = (logp_T - rollouts.old_logp(batch, logp_T)).exp()
        loss_T, clipped_T = rollouts.clipped(ratio_T, known[ADVANTAGE], o.clip, o.clip)
        kept_T = known[OLD_VALUE] + (value_T - known[OLD_VALUE]).clamp(-o.value_clip, o.value_clip)
        far_T = torch.maximum((value_T - known[RETURN]).square(), (kept_T - known[RETURN]).square()) / 2
        shown = {
            "accuracy": got["correct"],
            "entropy": -logp_T,
            "clip_share": clipped_T,
            "kl": rollouts.k3(logp_T, known[REFERENCE]),
        }
        return {
            "loss": Term((loss_T * batch.weights_T).double().sum(), n),
            "value": Term((far_T * batch.weights_T).double().sum(), n, o.value_coefficient),
            **rollouts.token_means(batch, **shown),
        }

    def report(self, means: dict[str, float]) -> dict[str, float]:
        named = {"value_loss": means["value"]} if "value" in means else {}
        return {**{name: means[name] for name in ("kl", "entropy", "clip_share") if name in means}, **named}


def gae(reward_n: Tensor, value_n: Tensor, gamma: float, lam: float) -> Tensor:
    """[n] A_t = d_t + gamma lam A_(t+1), d_t = r_t + gamma V_(t+1) - V_t; after the last token both are 0.

    Schulman et al. 2016 (arXiv 1506.02438, equation 16). An answer that was cut off ends there, too.
    """
    advantage_n, after, value = torch.empty_like(reward_n), 0.0, 0.0
    for t in reversed(range(len(reward_n))):
        after = float(reward_n[t]) + gamma * value - float(value_n[t]) + gamma * lam * after
        advantage_n[t], value = after, float(value_n[t])
    return advantage_n
