"""Regression of whole rows: a value for a text or a pair of texts, through the model's head (models/heads.py)."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel

from tunewright.objectives import base, rows
from tunewright.objectives.base import ObjectiveCard, TokenModel
from tunewright.ops.types import Batch, Term


class Regress:
    """loss = sum_s (score_s - label_s)^2 / number of labelled rows (mean squared error over the optimizer step).

    Terms: `loss`; `accuracy` (coef 0), which is the share of rows whose score is within 0.5 of the label; `error`
    (coef 0), the mean absolute error.
    """

    class Options(base.Options):
        pass

    card: ClassVar[ObjectiveCard] = ObjectiveCard(title="Regression", shapes=("labelled",), head="regress")

    def __init__(self, options: BaseModel) -> None:
        self.options = options

    def weights(self, batch: Batch) -> dict[str, float]:
        return dict.fromkeys(("loss", "accuracy", "error"), float(rows.is_labelled(batch).sum()))

    def __call__(self, policy: TokenModel, batch: Batch, stats: Any = None) -> dict[str, Term]:
        has_S = rows.is_labelled(batch)
        off_N = policy.scores(batch)[has_S, 0] - batch.per_segment["label"][has_S]
        n, far_N = float(len(off_N)), off_N.detach().abs()
        return {
            "loss": Term(off_N.square().sum(), n),
            "accuracy": Term((far_N <= 0.5).sum().float(), n, coef=0.0),
            "error": Term(far_N.sum(), n, coef=0.0),
        }

    def report(self, means: dict[str, float]) -> dict[str, float]:
        return {"mean_absolute_error": means["error"]}
