"""From logits to a token. A draw depends on (seed, choice, position) only, so a batch samples like a single request."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tunewright.engine.request import Sampling

_NARROW = 512  # top-p rarely keeps more tokens; sorting the whole vocabulary costs 20 times as much


def draw(seed: int, choice: int, position: int) -> float:
    """A uniform number in [0, 1) that is a function of its arguments: 53 bits of a hash."""
    text = f"{seed}/{choice}/{position}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2.0**64 * (1 - 2.0**-53)


def choose(logits_V: Tensor, how: Sampling, u: float) -> int:
    """The token that the uniform draw `u` picks. logits_V: [V] float32, edited already.

    Temperature, then top-k, then top-p over what top-k left; at least one token stays. Greedy at temperature 0.
    """
    if how.temperature == 0 or how.top_p == 0 or how.top_k == 1:
        return int(logits_V.argmax())
    # shifted before the division, so that a tiny temperature cannot overflow
    scaled_V = (logits_V - logits_V.max()) / how.temperature
    if how.top_k == 0 and how.top_p >= 1:
        return _invert(torch.softmax(scaled_V, -1), u)
    mass_K, ids_K = _largest(scaled_V, how)
    return int(ids_K[_invert(mass_K, u)])


def _largest(scaled_V: Tensor, how: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities (not normalised) and ids of the tokens that stay, likeliest first."""
    n = scaled_V.numel()
    k = min(how.top_k or n, n)
    width = min(k, _NARROW)
    while True:
        values_K, ids_K = torch.topk(scaled_V, width)
        whole = torch.logsumexp(values_K if width == k else scaled_V, -1)
        if how.top_k and width < k:
            whole = torch.logsumexp(torch.topk(scaled_V, k).values, -1)
        mass_K = torch.exp(values_K - whole)
        reached = torch.cumsum(mass_K, -1, dtype=torch.float64)
        if width == k or float(reached[-1]) >= how.top_p:
            # a token stays while the mass before it is below top_p
            kept = int(((reached - mass_K) < how.top_p).sum()) if how.top_p < 1 else width
            return mass_K[: max(kept, 1)], ids_K[: max(kept, 1)]
        width = min(k, width * 16)


def _invert(mass_K: Tensor, u: float) -> int:
    """The first index at which the cumulative mass exceeds u times the whole."""
    reached = torch.cumsum(mass_K, -1, dtype=torch.float64)
    at = torch.searchsorted(reached, u * float(reached[-1]), right=True)
    return min(int(at), mass_K.numel() - 1)


def add_logits(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """[V]: the weighted sum. Models of one vocabulary may pad it to different sizes; the smallest holds every token."""
    n = min(logits_V.numel() for logits_V, _ in parts)
    total_V = torch.zeros(n, dtype=torch.float64)  # what cancels should leave nothing behind
    for logits_V, weight in parts:
        total_V += weight * logits_V[:n].double()
    return total_V.float()


def edit_logits(logits_V: Tensor, how: Sampling, counts: Mapping[int, int]) -> Tensor:
    """Logits after logit_bias and OpenAI's penalties. counts: how often each token was generated so far."""
    if not how.edits_logits:
        return logits_V
    out_V = logits_V.clone()
    for token, bias in how.logit_bias.items():
        if 0 <= token < out_V.numel():
            out_V[token] += bias
    if counts and (how.presence_penalty or how.frequency_penalty):
        ids = torch.tensor(list(counts), dtype=torch.long, device=out_V.device)
        n = torch.tensor(list(counts.values()), dtype=out_V.dtype, device=out_V.device)
        out_V[ids] -= how.presence_penalty + how.frequency_penalty * n
    return out_V


def logprobs(logits_V: Tensor, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """The model's own log-probability of `token` (at temperature 1) and of the `top` likeliest tokens."""
    logp_V = torch.log_softmax(logits_V, -1)
    values, ids = torch.topk(logp_V, min(top, logp_V.numel()))
    return float(logp_V[token]), list(zip(ids.tolist(), values.tolist(), strict=True))
