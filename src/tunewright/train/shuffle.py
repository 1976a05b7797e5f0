"""The order of rows: a function of (seed, pass, how many), the same in every attempt and with every library."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt


@lru_cache(maxsize=4)
def order(seed: int, epoch: int, n: int) -> npt.NDArray[np.int64]:
    """[n] the rows' order in an epoch (0-based), a function of (seed, epoch, n) alone: rows sorted by a hash of each.

    The hash is the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), so no library's generator decides it.
    """
    key = int.from_bytes(hashlib.sha256(f"order/{seed}/{epoch}".encode()).digest()[:8], "big")
    x = np.arange(n, dtype=np.uint64)
    x *= np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    rows = np.argsort(x, kind="stable")
    rows.setflags(write=False)
    return rows
