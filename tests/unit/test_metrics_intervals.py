"""Intervals and paired tests against scipy and hand-computed values."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy import stats

from tunewright.metrics.accuracy import hits, majority, share
from tunewright.metrics.intervals import mcnemar, paired_bootstrap, wilson


@pytest.mark.parametrize("n", [1, 7, 100, 4000])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_equals_scipy(n: int, confidence: float) -> None:
    for k in {0, 1, n // 3, n - 1, n}:
        got = wilson(k, n, confidence)
        want = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
        assert (got.value, got.low, got.high) == pytest.approx((k / n, want.low, want.high), abs=1e-12)


def test_wilson_of_80_of_100() -> None:
    got = wilson(80, 100)
    assert (round(got.low, 3), round(got.high, 3)) == (0.711, 0.867)


@pytest.mark.parametrize(("k", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_share(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="is not a share"):
        wilson(k, n)


@pytest.mark.parametrize(("b", "c"), [(15, 5), (0, 0), (1, 0), (0, 9), (30, 12), (4, 4), (200, 170)])
def test_mcnemar_equals_scipys_binomial_test(b: int, c: int) -> None:
    a = [True] * b + [False] * c + [True, False] * 3
    other = [False] * b + [True] * c + [True, False] * 3
    got = mcnemar(a, other)
    want = stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert (got.only_a, got.only_b) == (b, c)
    assert got.p == pytest.approx(want, rel=1e-9)


def test_mcnemar_of_15_against_5() -> None:
    assert mcnemar([True] * 15 + [False] * 5, [False] * 15 + [True] * 5).p == pytest.approx(0.0414, abs=5e-5)


def test_bootstrap_of_a_difference_agrees_with_theory() -> None:
    rng = random.Random(1)
    a = [rng.random() < 0.8 for _ in range(400)]
    b = [x if rng.random() < 0.7 else rng.random() < 0.5 for x in a]
    got = paired_bootstrap(a, b)
    difference = np.subtract(a, b, dtype=float)
    error = difference.std() / math.sqrt(len(a))
    assert got.value == pytest.approx(difference.mean())
    assert got.low == pytest.approx(difference.mean() - 1.96 * error, abs=0.15 * error)
    assert got.high == pytest.approx(difference.mean() + 1.96 * error, abs=0.15 * error)


def test_bootstrap_is_paired() -> None:
    """Two systems that differ by the same amount on every row leave no doubt, however much the rows vary."""
    rng = random.Random(2)
    b = [rng.gauss(0, 100) for _ in range(50)]
    got = paired_bootstrap([x + 1 for x in b], b)
    assert (got.value, got.low, got.high) == pytest.approx((1, 1, 1))


def test_bootstrap_repeats_with_its_seed_and_covers_all_resamples() -> None:
    a, b = [True] * 60 + [False] * 40, [False] * 30 + [True] * 30 + [False] * 40
    assert paired_bootstrap(a, b, seed=3) == paired_bootstrap(a, b, seed=3)
    assert paired_bootstrap(a, b, seed=3) != paired_bootstrap(a, b, seed=4, resamples=50)


@pytest.mark.parametrize("compare", [mcnemar, paired_bootstrap])
def test_paired_comparisons_need_the_same_rows(compare: object) -> None:
    for a, b in (([True], [True, False]), ([], [])):
        with pytest.raises(ValueError, match="same rows twice"):
            compare(a, b)  # type: ignore[operator]


def test_hits_and_share() -> None:
    assert hits(["a", None, "b"], ["a", "a", "c"]) == [True, False, False]
    assert share([True, False, False, True]).value == 0.5
    with pytest.raises(ValueError, match="zip"):
        hits(["a"], ["a", "b"])


def test_majority_breaks_ties_by_name() -> None:
    assert majority(["b", "a", "b", "a", "c"]) == "a"
    with pytest.raises(ValueError, match="no majority"):
        majority([])
