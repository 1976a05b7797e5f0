"""Error bars: the Wilson interval of a share, and two ways to compare two systems on the same rows.

All inputs are per-row outcomes in the same order, so that a hard row is hard for both systems (paired comparison).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_BLOCK = 1 << 22  # resampled indices held at once


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided confidence bounds, in the unit of the estimate."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Discordant:
    """McNemar's test. only_a, only_b: rows that only one of them got right. p: two-sided, exact."""

    only_a: int
    only_b: int
    p: float


def wilson(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share (Wilson 1927); right also for small n and shares near 0 or 1.

    successes of n trials, 0 <= successes <= n, n >= 1. Bounds lie in [0, 1]. Raises ValueError otherwise. A trial may
    be a mean of several outcomes: it varies at most as much as one, so the interval is then too wide rather than too
    narrow.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n} trials is not a share")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p, zz = successes / n, z * z
    middle = (p + zz / (2 * n)) / (1 + zz / n)
    half = z * math.sqrt(p * (1 - p) / n + zz / (4 * n * n)) / (1 + zz / n)
    return Interval(p, max(0.0, middle - half), min(1.0, middle + half))


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """mean(a) - mean(b) with its percentile interval, rows drawn with replacement, both systems on the same rows.

    a, b: [N] scores of the same N >= 1 rows. The same seed gives the same interval. ValueError if lengths differ.
    """
    difference_N = _paired(a, b)
    n = len(difference_N)
    rng = np.random.default_rng(seed)
    per_block = max(1, _BLOCK // n)
    means = [
        difference_N[rng.integers(0, n, size=(min(per_block, resamples - done), n))].mean(axis=1)
        for done in range(0, resamples, per_block)
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(float(difference_N.mean()), float(low), float(high))


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> Discordant:
    """McNemar's exact test (1947) of two systems' right or wrong answers on the same rows.

    a, b: [N] booleans. p is the chance of a split at least this uneven if each differing row were a fair coin;
    1.0 when they never differ.
    """
    difference_N = _paired(a, b)
    only_a, only_b = int((difference_N > 0).sum()), int((difference_N < 0).sum())
    n, fewer = only_a + only_b, min(only_a, only_b)
    p = 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n
    return Discordant(only_a, only_b, min(1.0, p))


def _paired(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    if len(a) != len(b) or not len(a):
        raise ValueError(f"a paired comparison needs the same rows twice, not {len(a)} and {len(b)}")
    return np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
