"""Which parameters matter to the data: the empirical Fisher information's diagonal, and its k largest entries.

F_i = 1/N sum_n (d log p(y_n | x_n) / d w_i)^2 (Sung et al. 2021, arXiv 2111.09839, equation 4; Xu et al. 2021, arXiv
2109.05687, equation 5). Only the order of the entries is used, so the sum is not divided by N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunewright.core.errors import Diverged

CHUNK = 1 << 22  # numbers looked at at once, so that counting takes little memory
HALF = 16  # bits


def largest(scores: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """Flat ascending positions (int32 where they fit) of the k largest scores over all tensors; exactly k in all.

    scores: float32, none negative. Of equal ones the first count, in the order of the tensors. The k-th largest is
    found by counting bits, 16 at a time: no sort, no copy. Raises Diverged if a score is not finite.
    """
    bad = [name for name, x in scores.items() if not torch.isfinite(x).all()]
    if bad:
        raise Diverged(f"The gradients that choose what is trained are not finite: {', '.join(bad[:3])}.")
    # the bits of numbers from 0 on, read as integers, are in the same order as the numbers
    bits = {name: x.contiguous().view(-1).view(torch.int32) for name, x in scores.items()}
    k = min(k, sum(len(b) for b in bits.values()))
    upper, above = _bucket(bits, k, lambda b: b >> HALF)
    lower, above = _bucket(bits, k, lambda b: (b & 0xFFFF)[b >> HALF == upper], above)
    least, left = upper << HALF | lower, k - above
    found: dict[str, Tensor] = {}
    for name, b in bits.items():
        chosen = b > least
        equal = (b == least).nonzero()[:left, 0]
        chosen[equal] = True
        left -= len(equal)
        found[name] = chosen.nonzero()[:, 0].to(torch.int32 if len(b) < 1 << 31 else torch.int64)
    return {name: at for name, at in found.items() if len(at)}


def _bucket(bits: dict[str, Tensor], k: int, part: object, above: int = 0) -> tuple[int, int]:
    """(the bucket that holds the k-th largest, how many lie in higher ones). above: how many larger ones there are."""
    counts = sum(
        torch.bincount(part(some), minlength=1 << HALF)  # type: ignore[operator]
        for b in bits.values()
        for some in b.split(CHUNK)
    )
    down = counts.flip(0).cumsum(0) + above  # type: ignore[union-attr]
    i = int((down >= k).nonzero()[0])
    return (1 << HALF) - 1 - i, int(down[i - 1]) if i else above
