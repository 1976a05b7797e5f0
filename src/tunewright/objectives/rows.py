"""What the objectives over whole rows share: labelled rows of a batch, class weights, the counts behind F1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from tunewright.core.errors import SpecError, did_you_mean
from tunewright.objectives.base import Options
from tunewright.ops.types import Batch, Term

COUNTED = 64  # with more classes the F1 score is not followed: it takes three numbers a class in every step
KINDS = ("hit", "said", "true")


class ClassOptions(Options):
    """Options of every objective over classes."""

    labels: list[str] | None = Field(
        None, description="the classes in order; empty: those of the training file. Any other label is refused"
    )
    class_weights: Literal["none", "balanced"] | dict[str, float] = Field(
        "none", description="weight of each class in the loss: balanced by how rare it is, or a number for some of them"
    )
    focal_gamma: float = Field(
        0.0, ge=0, le=10, description="focal loss: rows that are right with chance p count (1 - p)^gamma; 0 is off"
    )


def is_labelled(batch: Batch) -> Tensor:
    """[S] bool: rows that have a label, or labels."""
    known = batch.per_segment.get("label")
    return ~(batch.per_segment["labels"][:, 0] if known is None else known).isnan()


def class_weights(
    asked: str | dict[str, float], labels: Sequence[str], balanced: Sequence[float], objective: str
) -> list[float] | None:
    """[L] weights, or None where all are 1. balanced: what `balanced` stands for. Raises SpecError."""
    if isinstance(asked, str):
        return list(balanced) if asked == "balanced" else None
    unknown = sorted(set(asked) - set(labels))
    low = sorted(name for name, w in asked.items() if not 0 < w <= 1e6)
    if unknown or low:
        said = [f"there is no class '{n}' (classes: {', '.join(labels)}){did_you_mean(n, labels)}" for n in unknown]
        said += [f"the weight of '{n}' is {asked[n]:g}; allowed: above 0, to 1e6" for n in low]
        raise SpecError(f"objective '{objective}', option class_weights: {'; '.join(said)}.", param="objective")
    return [float(asked.get(label, 1.0)) for label in labels]


def counts(labels: Sequence[str]) -> list[str]:
    """Names of the terms from which F1 is made: for each class `hit k`, `said k` and `true k`."""
    known = len(labels) if len(labels) <= COUNTED else 0
    return [f"{kind} {k}" for k in range(known) for kind in KINDS]


def count_terms(labels: Sequence[str], said_NL: Tensor, true_NL: Tensor) -> dict[str, Term]:
    """The terms of counts(), from what the model says and what is true, 0 or 1 each."""
    kinds = ((said_NL * true_NL).sum(0), said_NL.sum(0), true_NL.sum(0))
    columns = [count_L[k] for k in range(true_NL.shape[1]) for count_L in kinds]
    return {name: Term(x, float(len(true_NL)), coef=0.0) for name, x in zip(counts(labels), columns, strict=False)}


def f1_scores(labels: Sequence[str], means: dict[str, float]) -> dict[str, float]:
    """`macro_f1`: the mean over classes of 2 hit / (said + true); `micro_f1`: the same of all classes' counts.

    A class that neither occurs nor is said is left out, as in scikit-learn.
    """
    shares = [[means[f"{kind} {k}"] for kind in KINDS] for k in range(len(counts(labels)) // len(KINDS))]
    scores = [2 * hit / (said + true) for hit, said, true in shares if said + true > 0]
    if not scores:
        return {}
    hit, said, true = (sum(column) for column in zip(*shares, strict=True))
    return {"macro_f1": sum(scores) / len(scores), "micro_f1": 2 * hit / (said + true)}
