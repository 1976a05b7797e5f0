"""From an objective's held-out rows, before and after, to a verdict. Rows are averaged over seeds first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from tunewright.metrics.intervals import Interval, mcnemar, paired_bootstrap, wilson

Runs = Sequence[Mapping[str, Any]]
ORDERED, ORDERED_PAIRS = 0.52, 400
POINTS = 0.3
SURE = 0.05
MOST_NATS, LENGTH = 10.0, 0.5


@dataclass(frozen=True)
class Verdict:
    """before, after, change: as the table shows them. met: whether what is asked of the objective holds."""

    before: str
    after: str
    change: str
    met: bool


def averaged(runs: Runs, side: str) -> list[float]:
    """[rows] of `before` or `after`."""
    return [fmean(values) for values in zip(*(r[side] for r in runs), strict=True)]


def means(runs: Runs, name: str) -> float:
    """Of one of the further figures, over seeds."""
    return fmean(r["more"][name] for r in runs)


def rises(runs: Runs) -> Verdict:
    """The paired 95 % interval over rows lies above 0."""
    return _moved(runs, lambda change: change.low > 0)


def falls(runs: Runs) -> Verdict:
    """It lies below 0."""
    return _moved(runs, lambda change: change.high < 0)


def _moved(runs: Runs, asked: Callable[[Interval], bool]) -> Verdict:
    before, after = averaged(runs, "before"), averaged(runs, "after")
    change = paired_bootstrap(after, before)
    return Verdict(f"{fmean(before):.3f}", f"{fmean(after):.3f}", _signed(change), asked(change))


def _signed(x: Interval) -> str:
    return f"{x.value:+.3f} ({x.low:+.3f} to {x.high:+.3f})"


def pays(runs: Runs) -> Verdict:
    """The mean reward rises by more than two standard errors of the rows' differences."""
    before, after = averaged(runs, "before"), averaged(runs, "after")
    gained = [b - a for a, b in zip(before, after, strict=True)]
    error = stdev(gained) / math.sqrt(len(gained))
    change = f"{fmean(gained):+.3f} (s.e. {error:.3f})"
    return Verdict(f"{fmean(before):.3f}", f"{fmean(after):.3f}", change, fmean(gained) > 2 * error)


def pays_nearby(runs: Runs) -> Verdict:
    """The same, close to the start: mean KL, and mean length against the start's."""
    found, nats = pays(runs), means(runs, "nats")
    lengths = means(runs, "tokens_before"), means(runs, "tokens_after")
    told = f"{found.change}; {nats:.1f} nats; {lengths[0]:.0f} -> {lengths[1]:.0f} tokens"
    near = nats <= MOST_NATS and abs(lengths[1] / lengths[0] - 1) <= LENGTH
    return Verdict(found.before, found.after, told, found.met and near)


def satisfies(runs: Runs) -> Verdict:
    """The share of prompts whose answer keeps the rule rises by 30 points."""
    before, after = averaged(runs, "before"), averaged(runs, "after")
    change = paired_bootstrap(after, before)
    told = f"{100 * change.value:+.0f} points ({100 * change.low:+.0f} to {100 * change.high:+.0f})"
    return Verdict(f"{fmean(before):.0%}", f"{fmean(after):.0%}", told, change.value >= POINTS)


def orders(runs: Runs) -> Verdict:
    """At least 400 pairs, Wilson's lower bound above 0.52. One trial a pair, however many seeds: they are not
    independent."""
    right = averaged(runs, "after")
    found = wilson(sum(right), len(right))
    told = f"{found.value:.1%} ({found.low:.1%} to {found.high:.1%})"
    met = found.low > ORDERED and len(right) >= ORDERED_PAIRS
    return Verdict("50%", told, f"{100 * (found.value - 0.5):+.1f} points", met)


def classifies(runs: Runs) -> Verdict:
    """McNemar's test against TF-IDF + logistic regression (`before`) and the majority class, in every seed."""
    p = {side: max(mcnemar(*_outcomes(r, side)).p for r in runs) for side in ("before", "majority")}
    better = {side: all(sum(r["after"]) > sum(_side(r, side)) for r in runs) for side in p}
    before, after = fmean(averaged(runs, "before")), fmean(averaged(runs, "after"))
    majority = fmean(fmean(r["more"]["majority"]) for r in runs)
    told = f"p {_p(p['before'])} against TF-IDF, {_p(p['majority'])} against the majority class ({majority:.0%})"
    return Verdict(f"{before:.0%}", f"{after:.0%}", told, all(better[s] and p[s] < SURE for s in p))


def _side(run: Mapping[str, Any], side: str) -> list[bool]:
    return run["before"] if side == "before" else run["more"]["majority"]


def _outcomes(run: Mapping[str, Any], side: str) -> tuple[list[bool], list[bool]]:
    return run["after"], _side(run, side)


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"
