"""Per-segment attention for packed rows, as the attention implementation "tunewright" of transformers.

Each segment attends to itself (and to its parent's prefix, where a prompt is shared), so tokens of different examples
cannot see each other by construction, and no mask of the row is ever built: transformers builds none for an
implementation it does not know. Causal for decoders, both ways for encoders.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from tunewright.core.errors import UserError
from tunewright.ops.padding import buckets, places, real
from tunewright.ops.types import Batch
from tunewright.ops.virtual import KeysValues

NAME = "tunewright"
# On a CPU the backward in bfloat16 is 5 times (50 tokens) to 2 times (150) slower than in float32; equal at about 300.
SHORT = 256
TOGETHER = 128  # segments up to this length are computed with all others, where a call for each would cost more


def segment_attention(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    cu_seqlens: Sequence[int],
    *,
    scale: float | None = None,
    window: int | None = None,
    causal: bool = True,
    prefixes: Sequence[tuple[int, int]] | None = None,
    before: KeysValues | None = None,
) -> Tensor:
    """Attention within each segment. B is 1; K/V may have fewer heads (grouped queries).

    cu_seqlens: S+1 cumulative lengths from 0 to T. scale: factor on the scores, default K ** -0.5.
    window: a token sees itself and the window - 1 tokens before it; None is all of them.
    causal: whether a token sees only itself and what is before it; else its whole segment.
    prefixes: from `prefixes_of`; what a segment sees before its own tokens.
    before: keys and values [1, Hkv, N, K] that every segment sees before all of that. Returns [1, H, T, K].
    """
    lengths = [b - a for a, b in pairwise(cu_seqlens)]
    if prefixes is None and window is None and q_BHTK.device.type == "cpu" and max(lengths) <= TOGETHER < sum(lengths):
        return _together(q_BHTK, k_BHTK, v_BHTK, tuple(lengths), scale, causal, before)
    # split, not slices: the gradient of a slice is a zero-padded tensor of the whole row
    parts = list(zip(*(x.split(lengths, dim=2) for x in (q_BHTK, k_BHTK, v_BHTK)), strict=True))
    outs = []
    for i, (q, k, v) in enumerate(parts):
        parent, n = (-1, 0) if prefixes is None else prefixes[i]
        if n:
            _, parent_k, parent_v = parts[parent]
            k, v = torch.cat([parent_k[:, :, :n], k], dim=2), torch.cat([parent_v[:, :, :n], v], dim=2)
        if before is not None:
            k, v = torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)
        outs.append(_one_segment(q, k, v, scale, window, causal))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def _together(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    lengths: tuple[int, ...],
    scale: float | None,
    causal: bool,
    before: KeysValues | None,
) -> Tensor:
    """The same for many short segments: matrix products over all of them, padded to similar lengths. [1, H, T, K]."""
    dtype, groups = q_BHTK.dtype, q_BHTK.shape[1] // k_BHTK.shape[1]
    q, k, v = (x[0].transpose(0, 1).float() for x in (q_BHTK, k_BHTK, v_BHTK))  # [T, heads, K]
    outs = []
    sets, back_T = _sets(lengths, causal)
    for at_N, place_N, rows, blocked in sets:
        q_SHLK, k_SHLK, v_SHLK = (
            x.new_zeros(blocked.shape[-1] * rows, *x.shape[1:])
            .index_copy(0, place_N, x.index_select(0, at_N))
            .view(rows, blocked.shape[-1], *x.shape[1:])
            .transpose(1, 2)
            for x in (q, k, v)
        )
        if before is not None:
            k_SHLK, v_SHLK = (
                torch.cat([own.float().expand(rows, -1, -1, -1), x], dim=2)
                for own, x in zip(before, (k_SHLK, v_SHLK), strict=True)
            )
            blocked = F.pad(blocked, (before[0].shape[2], 0))
        if groups > 1:
            k_SHLK, v_SHLK = k_SHLK.repeat_interleave(groups, 1), v_SHLK.repeat_interleave(groups, 1)
        scores = (q_SHLK * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k_SHLK.transpose(-1, -2)
        out = scores.masked_fill_(blocked, -torch.inf).softmax(-1) @ v_SHLK
        outs.append(out.transpose(1, 2).flatten(0, 1).index_select(0, place_N))
    return torch.cat(outs).index_select(0, back_T).to(dtype).transpose(0, 1)[None]


@lru_cache(maxsize=2)  # every layer asks for the same
def _sets(lengths: tuple[int, ...], causal: bool) -> tuple[list[tuple[Tensor, Tensor, int, Tensor]], Tensor]:
    """Segments in sets of similar length, and where in the sets' tokens each token of the pack is.

    A set: [N] places of its tokens in the pack, [N] their places in S rows of L, S, and [S, 1, L, L] or [S, 1, 1, L]
    True where a query (row) may not see a key (column).
    """
    ends = [0, *accumulate(lengths)]
    sets = []
    for rows in buckets([(n,) for n in lengths], waste=0.3):
        own = [lengths[i] for i in rows]
        row_N, column_N = places(own, torch.device("cpu"))
        at_N = torch.cat([torch.arange(ends[i], ends[i + 1]) for i in rows])
        blocked = (real(own, torch.device("cpu")) == 0)[:, None, None]
        if causal:
            blocked = blocked | torch.ones(max(own), max(own), dtype=torch.bool).triu(1)
        sets.append((at_N, row_N * max(own) + column_N, len(rows), blocked))
    return sets, torch.cat([s[0] for s in sets]).argsort()


def prefixes_of(batch: Batch) -> list[tuple[int, int]] | None:
    """For each segment (its parent, how many of the parent's tokens it sees); None if no segment has a parent.

    A branch sees the parent's tokens before its own first position. Raises ValueError if a parent comes later, is a
    branch itself or is too short: attention would be wrong.
    """
    parents = batch.parent_S.tolist()
    if all(p < 0 for p in parents):
        return None
    starts, lengths = batch.position_T[batch.cu_seqlens[:-1].long()].tolist(), batch.cu_seqlens.diff().tolist()
    for i, p in enumerate(parents):
        if p >= 0 and not (p < i and parents[p] < 0 and starts[i] <= lengths[p]):
            raise ValueError(f"segment {i} cannot continue segment {p} at position {starts[i]}")
    return [(p, starts[i] if p >= 0 else 0) for i, p in enumerate(parents)]


def _one_segment(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, causal: bool) -> Tensor:
    """[1, H, L, K], in the dtype of q. The L queries are the last of the keys."""
    (length, total), dtype = (q.shape[2], k.shape[2]), q.dtype
    if dtype == torch.bfloat16 and q.device.type == "cpu" and length <= SHORT:
        q, k, v = q.float(), k.float(), v.float()
    banded = causal and window is not None and total > window
    mask = _band(length, total, window if banded else None, q.device) if banded or (causal and total > length) else None
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.to(dtype)


def _band(length: int, total: int, window: int | None, device: torch.device) -> Tensor:
    """[length, total] True where one of the last `length` tokens (row) may see a key (column), its window at most."""
    before = total - length
    seen = torch.ones(length, total, dtype=torch.bool, device=device).tril(before)
    return seen if window is None else seen.triu(before + 1 - window)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seqlens: Sequence[int] | None = None,
    prefixes: Sequence[tuple[int, int]] | None = None,
    virtual: Sequence[KeysValues] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls. query: [1, H, T, K]; key, value: [1, Hkv, T, K]. Returns ([1, T, H, K], None).

    cu_seqlens: None is one segment; then there may be more keys than queries, what a cache holds in front of them.
    virtual: for each layer the keys and values that every segment sees before its own. Raises UserError for what this
    attention does not compute.
    """
    n = query.shape[2]
    segments = [0, n] if cu_seqlens is None else cu_seqlens
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    before = _before(module, key, value, virtual)
    if cu_seqlens is None and key.shape[2] > n:
        cached = key.shape[2] - n
        before, key, value = (key[:, :, :cached], value[:, :, :cached]), key[:, :, cached:], value[:, :, cached:]
    problems = {
        "more than one row in a batch": query.shape[0] != 1,
        "keys of another length than the queries": key.shape[2] != n,
        "segments that do not cover the row": segments[-1] != n,
        "an attention mask": attention_mask is not None,
        "a window that looks ahead": not causal and sliding_window is not None,
        "dropout in its attention": dropout != 0.0,
        "capped attention scores": softcap is not None,
        "attention sinks": s_aux is not None,
        "a position bias": position_bias is not None,
    }
    wrong = [text for text, is_so in problems.items() if is_so]
    if wrong:
        raise UserError(
            f"This model cannot be trained here: {type(module).__name__} asks for {', '.join(wrong)}.",
            code="unsupported_model",
            param="model",
        )
    out = segment_attention(
        query,
        key,
        value,
        segments,
        scale=scaling,
        window=sliding_window,
        causal=causal,
        prefixes=prefixes,
        before=before,
    )
    return out.transpose(1, 2).contiguous(), None


def _before(module: nn.Module, key: Tensor, value: Tensor, virtual: Sequence[KeysValues] | None) -> KeysValues | None:
    """The layer's own of `virtual`, in the dtypes of its keys and values."""
    if virtual is None:
        return None
    keys, values = virtual[int(module.layer_idx)]  # pyright: ignore[reportArgumentType]
    return keys.to(key.dtype), values.to(value.dtype)


def register() -> str:
    """Make the implementation known to transformers (again is harmless); returns its name."""
    AttentionInterface.register(NAME, _forward)
    return NAME
