"""Right or wrong, row by row: what a share, its interval and a paired test are computed from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from tunewright.metrics.intervals import Interval, wilson


def hits(answers: Sequence[str | None], truths: Sequence[str]) -> list[bool]:
    """[N] whether each answer equals its truth; None (no usable answer) is wrong. ValueError on unequal lengths."""
    return [answer == truth for answer, truth in zip(answers, truths, strict=True)]


def share(outcomes: Sequence[bool], confidence: float = 0.95) -> Interval:
    """The share of True among N >= 1 outcomes, with Wilson's interval."""
    return wilson(sum(outcomes), len(outcomes), confidence)


def majority(labels: Iterable[str]) -> str:
    """The most frequent label; of equally frequent ones the first in the alphabet. Raises ValueError without labels."""
    counts = Counter(labels)
    if not counts:
        raise ValueError("there is no majority among no labels")
    return min(counts, key=lambda label: (-counts[label], label))
