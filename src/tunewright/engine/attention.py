"""Attention of a serving step: one packed row with the new tokens of many sequences, each with its own cache.

The plan says which part of the row belongs to whom. Sequences with one new token are computed together, one call a
pool; several new tokens of a sequence (its prompt) are a call of their own. Registered with transformers as
"tunewright_serve"; the plan comes as the forward's keyword `kv`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from tunewright.engine.kv_cache import Cache, Pool

NAME = "tunewright_serve"


class UnsupportedAttention(ValueError):
    """The model asks for something that this attention does not compute; the text says what."""


@dataclass
class Singles:
    """One new token of each of B sequences of a pool of N.

    rows_N: for each slot its token's place in the row (0 for a slot that sits this step out: computed, not used).
    at_N: the new token's position in its sequence (0 likewise). slots_B: the slots that take part. longest: L, the
    tokens that the longest of them has, the new one included.
    """

    pool: Pool
    rows_N: Tensor
    at_N: Tensor
    slots_B: Tensor
    longest: int
    masks: dict[int, Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows_B = self.rows_N[self.slots_B]
        self.at_B = self.at_N[self.slots_B]

    def mask(self, window: int, dtype: torch.dtype) -> Tensor | None:
        """[N, 1, 1, L], 0 where a sequence may look and -inf elsewhere; None if all may look everywhere."""
        if window not in self.masks:
            places = torch.arange(self.longest, device=self.at_N.device)[None]
            blocked = places > self.at_N[:, None]
            if window:
                blocked |= places <= self.at_N[:, None] - window
            bias = torch.zeros(blocked.shape, dtype=dtype, device=blocked.device).masked_fill_(blocked, -torch.inf)
            self.masks[window] = bias[:, None, None] if bool(blocked.any()) else None
        return self.masks[window]


@dataclass
class Chunk:
    """Several new tokens of one sequence: the row's part [first, last), with `start` tokens in the cache before."""

    cache: Cache
    first: int
    last: int
    start: int
    masks: dict[int, Tensor | None] = field(default_factory=dict)

    def mask(self, window: int, device: torch.device) -> Tensor | None:
        """[n, start + n] bool for n new tokens; None where the kernel's own causal mask does."""
        if window not in self.masks:
            end = self.start + self.last - self.first
            query = torch.arange(self.start, end, device=device)[:, None]
            places = torch.arange(end, device=device)[None]
            allowed = places <= query
            if window:
                allowed &= places > query - window
            plain = self.start == 0 and (not window or end <= window)
            self.masks[window] = None if plain else allowed
        return self.masks[window]


@dataclass
class StepPlan:
    """Whose the row's tokens are."""

    singles: list[Singles]
    chunks: list[Chunk]


def attend_singles(s: Singles, layer: int, q_HTK: Tensor, k_HTK: Tensor, v_HTK: Tensor, scale: float, window: int):
    """Store the new keys and values, then attend: [B, H, K], in the order of slots_B."""
    keys, values = s.pool.layer(layer, k_HTK[None], v_HTK[None])
    keys[s.slots_B, :, s.at_B] = k_HTK[:, s.rows_B].transpose(0, 1)
    values[s.slots_B, :, s.at_B] = v_HTK[:, s.rows_B].transpose(0, 1)
    n, heads = s.rows_N.numel(), k_HTK.shape[0]
    # the queries that share a key head stand in for several query positions: nothing is repeated
    q_NHRK = q_HTK[:, s.rows_N].transpose(0, 1).reshape(n, heads, -1, q_HTK.shape[2])
    out = F.scaled_dot_product_attention(
        q_NHRK,
        keys[:n, :, : s.longest],
        values[:n, :, : s.longest],
        attn_mask=s.mask(window, q_HTK.dtype),
        scale=scale,
    ).reshape(n, q_HTK.shape[0], -1)
    return out if s.slots_B.numel() == n else out[s.slots_B]


def attend_chunk(c: Chunk, layer: int, q_HTK: Tensor, k_HTK: Tensor, v_HTK: Tensor, scale: float, window: int):
    """Store the chunk's keys and values, then attend causally: [n, H, K]."""
    keys, values = c.cache.pool.layer(layer, k_HTK[None], v_HTK[None])
    slot, end = c.cache.slot, c.start + c.last - c.first
    keys[slot, :, c.start : end] = k_HTK[:, c.first : c.last]
    values[slot, :, c.start : end] = v_HTK[:, c.first : c.last]
    mask = c.mask(window, q_HTK.device)
    out = F.scaled_dot_product_attention(
        q_HTK[None, :, c.first : c.last],
        keys[slot : slot + 1, :, :end],
        values[slot : slot + 1, :, :end],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q_HTK.shape[0] != k_HTK.shape[0],
    )
    return out[0].transpose(0, 1)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kv: StepPlan,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls. query: [1, H, T, K]; key, value: [1, Hkv, T, K]. Returns ([1, T, H, K], None)."""
    if softcap is not None or s_aux is not None:
        what = "attention sinks" if softcap is None else "capped attention scores"
        raise UnsupportedAttention(f"{type(module).__name__} needs {what}, which the engine does not compute yet")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = int(module.layer_idx)  # pyright: ignore[reportArgumentType]
    return attend(kv, layer, query[0], key[0], value[0], scale, sliding_window or 0)[None], None


def attend(kv: StepPlan, layer: int, q_HTK: Tensor, k_HTK: Tensor, v_HTK: Tensor, scale: float, window: int) -> Tensor:
    """[T, H, K]: the step's attention in one layer, its new keys and values stored."""
    out_THK = v_HTK.new_empty(q_HTK.shape[1], q_HTK.shape[0], v_HTK.shape[2])
    for s in kv.singles:
        out_THK[s.rows_B] = attend_singles(s, layer, q_HTK, k_HTK, v_HTK, scale, window)
    for c in kv.chunks:
        out_THK[c.first : c.last] = attend_chunk(c, layer, q_HTK, k_HTK, v_HTK, scale, window)
    return out_THK


def register() -> str:
    """Make the implementation known to transformers (again is harmless); returns its name."""
    AttentionInterface.register(NAME, _forward)
    return NAME
