"""Per-segment causal attention for packed rows, as the attention implementation "tunewright" of transformers.

No mask is ever built: each segment attends to itself through a causal kernel, so tokens of different examples cannot
see each other by construction. transformers builds no mask either for an implementation name it does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "tunewright"


class UnsupportedAttention(ValueError):
    """The model asks for something that this attention does not compute; the text says what."""


def segment_attention(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, cu_seqlens: Sequence[int], scale: float | None
) -> Tensor:
    """Causal attention within each segment. B is 1; K/V may have fewer heads (grouped queries).

    cu_seqlens: S+1 cumulative lengths from 0 to T. Returns [1, H, T, K].
    """
    gqa = q_BHTK.shape[1] != k_BHTK.shape[1]
    outs = [
        F.scaled_dot_product_attention(
            q_BHTK[:, :, a:b], k_BHTK[:, :, a:b], v_BHTK[:, :, a:b], is_causal=True, scale=scale, enable_gqa=gqa
        )
        for a, b in pairwise(cu_seqlens)
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seqlens: Sequence[int] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls. query: [1, H, T, K]; key, value: [1, Hkv, T, K]. Returns ([1, T, H, K], None)."""
    if cu_seqlens is None:
        cu_seqlens = [0, query.shape[2]]
    longest = max(b - a for a, b in pairwise(cu_seqlens))
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    problems = {
        "more than one row in a batch": query.shape[0] != 1,
        "keys of another length than the queries (a cache)": key.shape[2] != query.shape[2],
        "segments that do not cover the row": cu_seqlens[-1] != query.shape[2],
        "an attention mask": attention_mask is not None,
        "attention that looks ahead": not causal,
        "attention dropout": dropout != 0.0,
        "capped attention scores": softcap is not None,
        "attention sinks": s_aux is not None,
        f"a sliding window of {sliding_window} tokens on a row of {longest}": bool(sliding_window)
        and longest > (sliding_window or 0),
    }
    wrong = [text for text, is_so in problems.items() if is_so]
    if wrong:
        raise UnsupportedAttention(f"{type(module).__name__} needs {', '.join(wrong)}")
    out = segment_attention(query, key, value, cu_seqlens, scaling)
    return out.transpose(1, 2).contiguous(), None


def register() -> str:
    """Make the implementation known to transformers (again is harmless); returns its name."""
    AttentionInterface.register(NAME, _forward)
    return NAME
