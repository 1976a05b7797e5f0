"""Classification and regression of whole rows, through the model's head (models/heads.py)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from pydantic import BaseModel
from torch import Tensor

from tunewright.objectives.base import ObjectiveCard, Options, TokenModel
from tunewright.ops.types import Batch, Term

COUNTED = 64  # with more classes the F1 score is not followed: it takes three numbers a class in every step


class Classify:
    """loss = - sum_s log p(label_s | row_s) / number of labelled rows, the sums over the whole optimizer step.

    Terms: `loss`; with coef 0 `accuracy`, the share of rows whose most likely class is the label, and for each of the
    `labels` three shares of the rows: `hit k` are so and found, `said k` are called so, `true k` are so.
    """

    class Options(Options):
        pass

    card: ClassVar[ObjectiveCard] = ObjectiveCard(title="Classification", shapes=("labelled",), head="classify")

    labels: tuple[str, ...] = ()  # the classes' names, set when a job is put together

    def __init__(self, options: BaseModel) -> None:
        self.options = options

    def weights(self, batch: Batch) -> dict[str, float]:
        n = float((~batch.per_segment["label"].isnan()).sum())
        return dict.fromkeys(("loss", "accuracy", *self._counts()), n)

    def __call__(self, policy: TokenModel, batch: Batch, stats: Any = None) -> dict[str, Term]:
        scores_NL, label_N = _labelled(policy, batch)
        n, true_N, said_N = float(len(label_N)), label_N.long(), scores_NL.detach().argmax(-1)
        hit_N = said_N == true_N
        terms = {
            "loss": Term(F.cross_entropy(scores_NL, true_N, reduction="sum"), n),
            "accuracy": Term(hit_N.sum().float(), n, coef=0.0),
        }
        counts = [x_N.bincount(minlength=scores_NL.shape[-1]).float() for x_N in (true_N[hit_N], said_N, true_N)]
        columns = [count_L[k] for k in range(scores_NL.shape[-1]) for count_L in counts]
        return terms | {name: Term(x, n, coef=0.0) for name, x in zip(self._counts(), columns, strict=False)}

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """Metrics from the terms' means: `accuracy`, and `macro_f1`, the mean over classes of 2 hit / (said + true).

        A class that neither occurs nor is said is left out, as in scikit-learn.
        """
        found = {"accuracy": means["accuracy"]}
        shares = [[means[f"{kind} {k}"] for kind in _KINDS] for k in range(len(self.labels))] if self._counts() else []
        scores = [2 * hit / (said + true) for hit, said, true in shares if said + true > 0]
        return found | ({"macro_f1": sum(scores) / len(scores)} if scores else {})

    def _counts(self) -> list[str]:
        known = len(self.labels) if len(self.labels) <= COUNTED else 0
        return [f"{kind} {k}" for k in range(known) for kind in _KINDS]


_KINDS = ("hit", "said", "true")


class Regress:
    """loss = sum_s (score_s - label_s)^2 / number of labelled rows (mean squared error over the optimizer step).

    Terms: `loss`; `accuracy` (coef 0), which is the share of rows whose score is within 0.5 of the label; `error`
    (coef 0), the mean absolute error.
    """

    class Options(Options):
        pass

    card: ClassVar[ObjectiveCard] = ObjectiveCard(title="Regression", shapes=("labelled",), head="regress")

    def __init__(self, options: BaseModel) -> None:
        self.options = options

    def weights(self, batch: Batch) -> dict[str, float]:
        n = float((~batch.per_segment["label"].isnan()).sum())
        return {"loss": n, "accuracy": n, "error": n}

    def __call__(self, policy: TokenModel, batch: Batch, stats: Any = None) -> dict[str, Term]:
        scores_NL, label_N = _labelled(policy, batch)
        off_N = scores_NL[:, 0] - label_N
        n, far_N = float(len(label_N)), off_N.detach().abs()
        return {
            "loss": Term(off_N.square().sum(), n),
            "accuracy": Term((far_N <= 0.5).sum().float(), n, coef=0.0),
            "error": Term(far_N.sum(), n, coef=0.0),
        }

    def report(self, means: dict[str, float]) -> dict[str, float]:
        return {"mean_absolute_error": means["error"]}


def _labelled(policy: TokenModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """([N, labels] scores, [N] labels) of the rows that have a label."""
    has_S = ~batch.per_segment["label"].isnan()
    return policy.scores(batch)[has_S], batch.per_segment["label"][has_S]
