"""Classification of whole rows into any number of classes, through the model's head (models/heads.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from tunewright.objectives import rows
from tunewright.objectives.base import ObjectiveCard, TokenModel
from tunewright.ops.types import Batch, Term


class Multilabel:
    """loss = - sum_s mean_k [w_k y (1 - q)^gamma log q + (1 - y) q^gamma log(1 - q)] / rows, q = sigmoid(score_sk).

    y is 1 for a row's classes, else 0; the sums run over the whole step. w_k: class_weights; `balanced` is the number
    of training rows without the class over that of those with it. gamma > 0: focal loss (Lin et al. 2017, arXiv
    1708.02002). A class counts as said where q > 0.5.
    Terms: `loss`; with coef 0 `accuracy`, the share of rows of which all is right, and the counts of Classify.
    """

    Options = rows.ClassOptions
    card: ClassVar[ObjectiveCard] = ObjectiveCard(
        title="Classification into several classes", shapes=("labelled",), head="multilabel"
    )

    labels: tuple[str, ...] = ()  # the classes' names, set when a job is put together

    def __init__(self, options: rows.ClassOptions) -> None:
        self.options = options
        self._weight_L: list[float] | None = None

    def begin(self, labels: tuple[str, ...], counts: Sequence[int], n: int) -> None:
        """What the classes are, how many of the n training rows have each. Raises SpecError for weights of others."""
        self.labels = labels
        balanced = [(n - c) / c if c and c < n else 1.0 for c in counts]
        self._weight_L = rows.class_weights(self.options.class_weights, labels, balanced, "multilabel")

    def weights(self, batch: Batch) -> dict[str, float]:
        n = float(rows.is_labelled(batch).sum())
        return dict.fromkeys(("loss", "accuracy", *rows.counts(self.labels)), n)

    def __call__(self, policy: TokenModel, batch: Batch, stats: Any = None) -> dict[str, Term]:
        has_S = rows.is_labelled(batch)
        scores_NL, known_NK = policy.scores(batch)[has_S], batch.per_segment["labels"][has_S]
        true_NL = F.pad(known_NK, (0, scores_NL.shape[-1] - known_NK.shape[-1])).to(scores_NL.dtype)
        said_NL = (scores_NL.detach() > 0).to(scores_NL.dtype)
        n = float(len(true_NL))
        return {
            "loss": Term(self._losses(scores_NL, true_NL).mean(-1).sum(), n),
            "accuracy": Term((said_NL == true_NL).all(-1).sum().float(), n, coef=0.0),
            **rows.count_terms(self.labels, said_NL, true_NL),
        }

    def _losses(self, scores_NL: Tensor, true_NL: Tensor) -> Tensor:
        weight_L = None if self._weight_L is None else scores_NL.new_tensor(self._weight_L)
        loss_NL = F.binary_cross_entropy_with_logits(scores_NL, true_NL, reduction="none", pos_weight=weight_L)
        if not self.options.focal_gamma:
            return loss_NL
        wrong_NL = (scores_NL * (1 - 2 * true_NL)).sigmoid()  # the chance that the model gives to what is not so
        return wrong_NL**self.options.focal_gamma * loss_NL

    def report(self, means: dict[str, float]) -> dict[str, float]:
        return {"accuracy": means["accuracy"], **rows.f1_scores(self.labels, means)}
