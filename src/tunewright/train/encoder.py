"""Choosing the fast path of encoders (models/bert.py), which needs no kernels of its own."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from tunewright.models.bert import FastBert, serves
from tunewright.models.fast_llama import FastLlama
from tunewright.train.fast import FAST, PLAIN, Chosen


def choose_encoder(model: nn.Module, dtype: torch.dtype, wanted: str) -> Chosen | None:
    """The path of a BERT whose weights are all trained, or None. wanted: `auto` or `fast`; `plain` never takes it."""
    if wanted == PLAIN or not serves(model, dtype):
        return None
    forward = cast(FastLlama, FastBert(model, dtype))  # Chosen knows only its interface, which is the same
    return Chosen(FAST, forward, "The fast path for encoders runs, on torch's products.")
