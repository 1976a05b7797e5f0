"""KTO: learn from single answers marked good or bad, each measured against how far the model has moved in general."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tunewright.core.example import Example, Group
from tunewright.objectives import base
from tunewright.objectives.base import ObjectiveCard, TokenModel
from tunewright.ops import segments
from tunewright.ops.packing import pack
from tunewright.ops.types import Batch, Term

REWARDS = ("chosen_reward", "rejected_reward")
LOGPS = ("chosen_logp", "rejected_logp")


class KTO:
    """loss = 1 - s(beta (r(y) - z)) of a good answer y, 1 - s(beta (z - r(y))) of a bad one.

    r(y) = log p(y | x) - log p_reference(y | x); z = max(0, mean of r over mismatched answers) (Ethayarajh et al. 2024,
    arXiv 2402.01306, equations 7 and 8). A good answer's loss is multiplied by desirable_weight, a bad one's by
    undesirable_weight; the step's is the mean over its answers. z has no gradient: `stats` takes it over the whole
    step, each prompt followed by the answer to the next row's. A step of one row has no such answer; its z is 0.
    Rows are single answers with a label, or pairs: two answers, the first of which is good.
    Terms: `loss`; with coef 0 `accuracy`, the weighted share of the good answers' tokens that are most likely; `kl`,
    which is z; rewards (beta r) and log-probabilities of good (chosen) and bad (rejected) answers.
    """

    class Options(base.Options):
        beta: float = Field(
            0.1, gt=0, le=10, description="how close the model stays to the start: the larger, the closer"
        )
        desirable_weight: float = Field(1.0, gt=0, le=100, description="loss weight of good answers")
        undesirable_weight: float = Field(
            1.0, gt=0, le=100, description="loss weight of bad answers; good ones' weight times their number should be "
            "1 to 1.33 times the same of the bad ones"
        )  # fmt: skip

    card: ClassVar[ObjectiveCard] = ObjectiveCard(
        title="Kahneman-Tversky optimisation (KTO)",
        shapes=("unpaired", "preference"),
        group_size=0,
        needs_reference=True,
        lr_factor=0.1,
    )
    reference: TokenModel | None = None

    def __init__(self, options: Any) -> None:
        self.options = options

    def weights(self, batch: Batch) -> dict[str, float]:
        _, n_N, good_N = _answers(batch)
        n, good = float(len(n_N)), float(good_N.sum())
        sides = dict(zip((*REWARDS, *LOGPS), (good, n - good) * 2, strict=True))
        return {"loss": n, "accuracy": float(n_N[good_N].sum()), "kl": n, **sides}

    @torch.no_grad()
    def stats(self, policy: TokenModel, batches: Sequence[Batch]) -> float:
        """z of the step that these batches are."""
        ratios = [self._ratio(policy, batch) for batch in mismatched(batches)]
        return max(0.0, float(torch.cat(ratios).mean())) if ratios else 0.0

    def __call__(self, policy: TokenModel, batch: Batch, stats: float | None = None) -> dict[str, Term]:
        """stats: z, or None for a batch that is looked at alone."""
        z = self.stats(policy, [batch]) if stats is None else stats
        rows_N, _, good_N = _answers(batch)
        reference_N = _logp(self._reference().token_stats(batch, want={"logp"}), batch, rows_N)
        got = policy.token_stats(batch, want={"logp", "correct"})
        logp_N = _logp(got, batch, rows_N)
        reward_N = self.options.beta * (logp_N - reference_N)
        toward_N = torch.where(good_N, 1.0, -1.0) * (reward_N - self.options.beta * z)
        factor_N = torch.where(good_N, self.options.desirable_weight, self.options.undesirable_weight)
        correct_N = segments.sums(got["correct"] * batch.weights_T, batch)[rows_N]
        shown = {
            "accuracy": correct_N[good_N],
            "kl": torch.full_like(correct_N, z),
            "chosen_reward": reward_N[good_N],
            "rejected_reward": reward_N[~good_N],
            "chosen_logp": logp_N[good_N],
            "rejected_logp": logp_N[~good_N],
        }
        weights = self.weights(batch)
        return {
            "loss": Term((factor_N * (1 - toward_N.sigmoid())).sum(), weights["loss"]),
            **{name: Term(x.detach().sum(), weights[name], coef=0.0) for name, x in shown.items()},
        }

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """With the difference of the mean rewards, which is no mean over pairs."""
        margin = means["chosen_reward"] - means["rejected_reward"]
        return {**{name: means[name] for name in (*REWARDS, *LOGPS, "kl")}, "reward_margin": margin}

    def _ratio(self, policy: TokenModel, batch: Batch) -> Tensor:
        """[N] float64, of every answer that counts."""
        rows_N = _answers(batch)[0]
        reference_N = _logp(self._reference().token_stats(batch, want={"logp"}), batch, rows_N)
        return _logp(policy.token_stats(batch, want={"logp"}), batch, rows_N) - reference_N

    def _reference(self) -> TokenModel:
        assert self.reference is not None, "this objective needs the policy at step 0"
        return self.reference


def _logp(got: dict[str, Tensor], batch: Batch, rows_N: Tensor) -> Tensor:
    return segments.sums(got["logp"] * batch.weights_T, batch)[rows_N]


def _answers(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """[N] each: the segments that have supervised tokens, the sums of their loss weights, whether they are good.

    What has no label of its own is good if it is the first of its group.
    """
    rows_N = segments.examples(batch)
    good_N = segments.places(batch) == 0
    if "wanted" in batch.per_segment:
        wanted_N = batch.per_segment["wanted"][rows_N]
        good_N = torch.where(wanted_N.isnan(), good_N, wanted_N > 0)
    n_N = segments.sums(batch.weights_T, batch)[rows_N]
    counts_N = n_N > 0
    return rows_N[counts_N], n_N[counts_N], good_N[counts_N]


def mismatched(batches: Sequence[Batch]) -> list[Batch]:
    """The step's prompts, each followed by the answer to the next row's (the last one's by the first one's).

    Rows in the order of their numbers, so the step may be cut in any way; no longer than the step's longest. Nothing
    for a step of one row.
    """
    groups: dict[int, list[Example]] = {}
    for batch in batches:
        for example in _examples(batch):
            groups.setdefault(example.source, []).append(example)
    rows = [groups[source] for source in sorted(groups)]
    if len(rows) < 2:
        return []
    longest = max(len(e.ids) for own in rows for e in own)
    made = [
        Group((_joined(example, others[k % len(others)], longest),))
        for own, others in zip(rows, [*rows[1:], rows[0]], strict=True)
        for k, example in enumerate(own)
    ]
    return [b.to(batches[0].tokens_T.device) for b in pack(made, max(b.n_tokens for b in batches))]


def _examples(batch: Batch) -> list[Example]:
    """The whole examples that have an answer, a shared prompt put back before each of its answers."""
    tokens, weights, ends = batch.tokens_T.tolist(), batch.weights_T.tolist(), batch.cu_seqlens.tolist()
    starts, found = batch.position_T.tolist(), []
    for s in segments.examples(batch).tolist():
        a, b, parent = ends[s], ends[s + 1], int(batch.parent_S[s])
        before = tokens[ends[parent] : ends[parent] + starts[a]] if parent >= 0 else []
        own = [0.0] * (len(before) + 1) + weights[a : b - 1]
        if any(own):
            found.append(Example((*before, *tokens[a:b]), tuple(own), int(batch.source_S[s])))
    return found


def _joined(prompt_of: Example, answer_of: Example, longest: int) -> Example:
    """The one's prompt, the other's answer (what comes from the first supervised token on), up to `longest` tokens."""
    a, b = (next(t for t, w in enumerate(e.weights) if w) for e in (prompt_of, answer_of))
    ids, weights = prompt_of.ids[:a] + answer_of.ids[b:], (0.0,) * a + answer_of.weights[b:]
    return Example(ids[:longest], weights[:longest], prompt_of.source)
