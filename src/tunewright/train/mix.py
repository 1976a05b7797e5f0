"""Multi-task mixing: how many rows of each training file an epoch has, and which: functions of (seed, epoch) alone.

p_i = n_i^(1/T) / sum_j n_j^(1/T), or the given weights (temperature-scaled mixing: Raffel et al. 2020, arXiv
1910.10683, section 3.5.2; Arivazhagan et al. 2019, arXiv 1907.05019). An epoch has as many rows as all files together.
Nothing is drawn: a file's quota is met exactly in every epoch, and its rows come in turn, so none comes a second time
before all have come once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from tunewright.core.spec import Mix
from tunewright.ops.runtime import derive_seed
from tunewright.train.shuffle import order

Rows = npt.NDArray[np.int64]


def quotas(counts: Sequence[int], mix: Mix) -> list[int]:
    """Rows of each file in an epoch; they sum to sum(counts). counts: the files' rows, training_file first.

    The parts n p_i are rounded down, and the rows that are left go to the largest remainders (Hamilton's method).
    """
    n, given = sum(counts), mix.weights()
    parts = np.array(given if given is not None else [c ** (1 / mix.temperature) for c in counts], np.float64)
    exact = n * parts / parts.sum()
    whole = np.floor(exact + 1e-9).astype(np.int64)
    for i in np.argsort(-(exact - whole), kind="stable")[: n - int(whole.sum())]:
        whole[i] += 1
    return whole.tolist()


@lru_cache(maxsize=2)
def mixed_rows(files: tuple[tuple[int, int], ...], seed: int, epoch: int) -> Rows:
    """[sum of quotas] the rows of an epoch, file after file, as places in the files laid behind each other.

    files: (rows, quota) of each.
    """
    return _draws(files, seed, [(epoch * quota, (epoch + 1) * quota) for _, quota in files])


@lru_cache(maxsize=2)
def rows_in_turn(files: tuple[tuple[int, int], ...], seed: int, epoch: int, n_epochs: int) -> Rows:
    """The rows of an epoch, in their order, when all n_epochs of a file come before the next file's."""
    size, at = sum(quota for _, quota in files), 0
    spans = []
    for _, quota in files:
        first, stop = (min(max(e * size - at, 0), quota * n_epochs) for e in (epoch, epoch + 1))
        spans.append((first, stop))
        at += quota * n_epochs
    return _draws(files, seed, spans)


def _draws(files: tuple[tuple[int, int], ...], seed: int, spans: Sequence[tuple[int, int]]) -> Rows:
    """The draws from `first` to before `stop` of each file, file after file.

    A file's j-th draw over all epochs is row j mod n of its pass j // n, whose order comes from (seed, file, pass).
    """
    found, start = [], 0
    for i, ((n, _), span) in enumerate(zip(files, spans, strict=True)):
        turn, place = np.divmod(np.arange(*span, dtype=np.int64), max(n, 1))
        rows = np.empty(len(turn), np.int64)
        for k in np.unique(turn):
            rows[turn == k] = order(derive_seed("mix", seed, i), int(k), n)[place[turn == k]]
        found.append(start + rows)
        start += n
    rows = np.concatenate(found)
    rows.setflags(write=False)
    return rows
