"""Noise that does not depend on how a step is cut: a counter-based generator keyed by (seed, step, example, position).

A token's key is a hash of those four; a draw is a hash of the key with the place that asks (a layer) and the feature.
So a token gets the same noise in whatever micro-batch, order or process it is computed, a recomputation draws it again,
and a resumed step draws what the first one drew. The generator itself has no state.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tunewright.core.errors import UserError
from tunewright.ops.runtime import derive_seed
from tunewright.ops.types import Batch

# SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014), as signed 64-bit numbers
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MUL_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MUL_2 = 0x94D049BB133111EB - (1 << 64)
LEVELS = 1 << 16  # a draw has 16 bits, four draws come from one 64-bit hash


def _split(key: Tensor, n: Tensor) -> Tensor:
    """The n-th output (from 0) of SplitMix64 with the seed `key`: int64, elementwise."""
    x = key + (n + 1) * GOLDEN
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * MUL_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * MUL_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def token_keys(batch: Batch, seed: int, step: int) -> Tensor:
    """[T] int64: a token's key in this step, from its row's number, its example within the group and its position."""
    device = batch.tokens_T.device
    start = torch.tensor(derive_seed("noise", seed, step), device=device)
    first_S = torch.searchsorted(batch.group_S, batch.group_S)
    member_S = torch.arange(batch.n_segments, device=device) - first_S
    key_S = _split(_split(start, batch.source_S), member_S)
    lengths_S = batch.cu_seqlens.diff().long()
    return _split(key_S.repeat_interleave(lengths_S, output_size=batch.n_tokens), batch.position_T)


def source_keys(batch: Batch) -> Tensor:
    """[U] int64: the keys of the tokens that an encoder-decoder reads, from their segments' first keys."""
    assert batch.source is not None and batch.noise_T is not None
    starts, lengths_S = batch.source.cu_seqlens[:-1].long(), batch.source.cu_seqlens.diff().long()
    position_U = torch.arange(len(batch.source.tokens_U), device=starts.device) - starts.repeat_interleave(lengths_S)
    return _split(batch.noise_T[batch.cu_seqlens[:-1].long()].repeat_interleave(lengths_S), position_U)


def bits(key: Tensor, place: int, width: int) -> Tensor:
    """[..., width] int16, uniform over its whole range, for keys [...]. place: which of a token's draws this is."""
    columns = torch.arange((width + 3) // 4, device=key.device)
    column_C = _split(torch.tensor(place, device=key.device), columns)
    # both sides are hashes already, so half of the finaliser mixes them
    x = (key[..., None] ^ column_C).mul_(MUL_1)
    x ^= (x >> 32) & 0xFFFFFFFF
    return x.mul_(MUL_2).view(torch.int16)[..., :width]


def uniform(key: Tensor, place: int, width: int) -> Tensor:
    """[..., width] float32, uniform in (-1, 1), for keys [...]."""
    return (bits(key, place, width).float() + 0.5) * (2 / LEVELS)


def dropout(x: Tensor, key: Tensor, place: int, p: float) -> Tensor:
    """Inverted dropout of x [..., D] with keys [...]: an element is zero with probability p, else divided by 1 - p.

    p: below 1, rounded to a multiple of 2 ** -16.
    """
    level = round(p * LEVELS)
    dropped = bits(key, place, x.shape[-1]) < level - LEVELS // 2
    return x.masked_fill(dropped, 0) * (LEVELS / (LEVELS - level))


class KeyedDropout(nn.Module):
    """Dropout on the inputs [B, L, D] of one layer. key: [B, L], the keys of its tokens, set before each forward.

    reads_source: whether its inputs are those of an encoder-decoder's source side.

    Without keys, or where no gradient is asked for (validation, a reference pass), it does nothing.
    """

    def __init__(self, p: float, name: str, reads_source: bool = False) -> None:
        """name: the layer's, so that each layer draws its own."""
        super().__init__()
        self.p = p
        self.name = name
        self.reads_source = reads_source
        self.place = derive_seed("dropout", name)
        self.key: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.key is None or not torch.is_grad_enabled():
            return x
        if x.shape[:-1] != self.key.shape:
            raise UserError(
                f"Dropout cannot be used in the layer {self.name}: it runs on {tuple(x.shape[:-1])} tokens where the "
                f"batch has {tuple(self.key.shape)}. Set dropout to 0, or leave the layer out of target_modules.",
                param="tuner",
            )
        return dropout(x, self.key, self.place, self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def set_keys(model: nn.Module, key: Tensor | None, source_key: Tensor | None = None) -> None:
    """Tell every KeyedDropout the keys [B, L] of the tokens that come next, on its side; None: no noise.

    A pass without gradient is noiseless anyhow and changes nothing: a layer may still have to be computed again.
    """
    if torch.is_grad_enabled():
        for module in dropouts_of(model):
            module.key = source_key if module.reads_source else key


def dropouts_of(model: nn.Module) -> list[KeyedDropout]:
    return [m for m in model.modules() if isinstance(m, KeyedDropout)]


def keep_keys(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of a layer that may be called again later, always with the keys that the layer has now."""
    keys = [(module, module.key) for module in dropouts_of(layer)]

    def call(*args: Any) -> Any:
        for module, key in keys:
            module.key = key
        return forward(*args)

    return call if keys else forward


def embedding_noise(batch: Batch, *, width: int, alpha: float) -> Tensor:
    """[T, width] float32 to add to the embeddings: alpha / sqrt(L width) * uniform(-1, 1), L the example's length.

    NEFTune (Jain et al. 2023, arXiv 2310.05914, algorithm 1). Zeros where the batch has no keys.
    """
    if batch.noise_T is None:
        return torch.zeros(batch.n_tokens, width, device=batch.tokens_T.device)
    length_S = batch.position_T[batch.last_S] + 1
    length_T = length_S.repeat_interleave(batch.cu_seqlens.diff().long(), output_size=batch.n_tokens)
    scale_T = alpha / (length_T * width).float().sqrt()
    return uniform(batch.noise_T, derive_seed("embedding"), width) * scale_T[:, None]


def neftune(model: nn.Module, alpha: float) -> Callable[[Batch], Tensor] | None:
    """`embedding_noise` for the model's embeddings, or None where alpha is 0."""
    if not alpha:
        return None
    width = model.get_input_embeddings().weight.shape[-1]  # type: ignore[operator]
    return partial(embedding_noise, width=width, alpha=alpha)
