"""Classification of whole rows, one class each, through the model's head (models/heads.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tunewright.objectives import rows
from tunewright.objectives.base import ObjectiveCard, TokenModel
from tunewright.ops.types import Batch, Term


class Classify:
    """loss = - sum_s w(y_s) (1 - p_s)^gamma log p_s / sum_s w(y_s), p_s = p(y_s | row_s), over the whole step.

    w: class_weights; `balanced` is n / (L n_y) for n rows, n_y of them of the class, L classes that occur.
    gamma > 0: focal loss (Lin et al. 2017, arXiv 1708.02002, equation 5).
    Terms: `loss`; with coef 0 `accuracy`, the share of rows whose most likely class is the label, and for each of the
    `labels` three shares of the rows: `hit k` are so and found, `said k` are called so, `true k` are so.
    """

    Options = rows.ClassOptions
    card: ClassVar[ObjectiveCard] = ObjectiveCard(title="Classification", shapes=("labelled",), head="classify")

    labels: tuple[str, ...] = ()  # the classes' names, set when a job is put together

    def __init__(self, options: rows.ClassOptions) -> None:
        self.options = options
        self._weight_L: list[float] | None = None

    def begin(self, labels: tuple[str, ...], counts: Sequence[int], n: int) -> None:
        """What the classes are, how many of the n training rows have each. Raises SpecError for weights of others."""
        self.labels = labels
        occur = sum(c > 0 for c in counts)
        balanced = [n / (occur * c) if c else 1.0 for c in counts]
        self._weight_L = rows.class_weights(self.options.class_weights, labels, balanced, "classify")

    def weights(self, batch: Batch) -> dict[str, float]:
        has_S = rows.is_labelled(batch)
        n = float(has_S.sum())
        return {
            "loss": float(self._weight(batch.per_segment["label"][has_S].long()).sum()) if self._weight_L else n,
            **dict.fromkeys(("accuracy", *rows.counts(self.labels)), n),
        }

    def __call__(self, policy: TokenModel, batch: Batch, stats: Any = None) -> dict[str, Term]:
        has_S = rows.is_labelled(batch)
        scores_NL, true_N = policy.scores(batch)[has_S], batch.per_segment["label"][has_S].long()
        said_N = scores_NL.detach().argmax(-1)
        one_hot = [F.one_hot(x_N, scores_NL.shape[-1]).float() for x_N in (said_N, true_N)]
        return {
            "loss": Term(self._losses(scores_NL, true_N).sum(), self.weights(batch)["loss"]),
            "accuracy": Term((said_N == true_N).sum().float(), float(len(true_N)), coef=0.0),
            **rows.count_terms(self.labels, *one_hot),
        }

    def _losses(self, scores_NL: Tensor, true_N: Tensor) -> Tensor:
        loss_N = F.cross_entropy(scores_NL, true_N, reduction="none")
        if self.options.focal_gamma:
            loss_N = (1 - (-loss_N).exp()).clamp_min(0) ** self.options.focal_gamma * loss_N
        return loss_N * self._weight(true_N) if self._weight_L else loss_N

    def _weight(self, true_N: Tensor) -> Tensor:
        """[N] the weight of each row's class."""
        return true_N.new_tensor(self._weight_L, dtype=torch.float32)[true_N]

    def report(self, means: dict[str, float]) -> dict[str, float]:
        return {"accuracy": means["accuracy"], **rows.f1_scores(self.labels, means)}
