"""The verdict: is the tuned model better than the best of the others, and how sure is that?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunewright.evals.task import Scorecard
from tunewright.metrics.intervals import Discordant, Interval, mcnemar, paired_bootstrap

SURE = 0.05


@dataclass(frozen=True)
class Verdict:
    """One measure: a system against its best rival, on the same rows.

    difference: share minus the rival's share with its 95 % interval. test: rows that only one of them got right.
    word: `better` or `worse` if interval and test agree on it, else `too close to call`.
    """

    measure: str
    name: str
    rival: str
    difference: Interval
    test: Discordant
    word: str

    def __str__(self) -> str:
        d, t = self.difference, self.test
        return (
            f"{self.measure}: {self.name} against the best other ({self.rival}): {_points(d.value)} points "
            f"(95 % interval {_points(d.low)} to {_points(d.high)}); {t.only_a} rows only {self.name} has right, "
            f"{t.only_b} only the other ({_p(t.p)}): {self.word}."
        )


def judge(system: Scorecard, rivals: Sequence[Scorecard], measure: str) -> Verdict:
    """Compare with the rival that does best on `measure`. Raises ValueError when no rival has the measure."""
    there = [r for r in rivals if measure in r.outcomes]
    if not there:
        raise ValueError(f"nothing to compare with on '{measure}'")
    best = max(there, key=lambda r: sum(r.outcomes[measure]))
    ours, theirs = system.outcomes[measure], best.outcomes[measure]
    difference, test = paired_bootstrap(ours, theirs), mcnemar(ours, theirs)
    return Verdict(measure, system.name, best.name, difference, test, _word(difference, test))


def _word(difference: Interval, test: Discordant) -> str:
    if test.p >= SURE or difference.low <= 0 <= difference.high:
        return "too close to call"
    return "better" if difference.value > 0 else "worse"


def _points(value: float) -> str:
    return f"{100 * value:+.0f}"


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
