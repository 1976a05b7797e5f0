"""Choosing how the forward and backward are computed: the fast path's kernels, or the model's plain modules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tunewright.models.bert import FastBert, serves
from tunewright.models.fast_llama import FastLlama, runs_on_tiles
from tunewright.models.fast_serves import copied_bytes, why_not
from tunewright.models.policy import Fast
from tunewright.ops.kernels import KernelsMissing, load_kernels

FAST, PLAIN = "fast", "plain"


@dataclass(frozen=True)
class Chosen:
    """name: `fast` or `plain`. forward: what a Policy takes as `fast`. why: one sentence for the job's events.

    kernels: what the numbers depend on: `tiles`, `torch` or `none`.
    """

    name: str
    forward: Fast | None
    why: str
    kernels: str = "none"


def choose_path(model: nn.Module, dtype: torch.dtype, threads: int, folder: Path, wanted: str, room: float) -> Chosen:
    """The path for `model`. wanted: `auto` takes the fast one where it serves, `plain` never does.

    folder: where compiled kernels are kept. Compiling takes some seconds, once a machine. room: bytes that the job may
    still take; a copy of the weights, where one is needed, may take half of it.
    """
    if wanted == PLAIN:
        return Chosen(PLAIN, None, "The plain modules run, as was asked or decided.")
    encoder = serves(model, dtype)
    reason = None if encoder else why_not(model, dtype)
    if reason is not None:
        return Chosen(PLAIN, None, f"The plain modules run: {reason}.")
    try:
        kernels = load_kernels(folder, threads)
    except KernelsMissing as e:
        return Chosen(PLAIN, None, f"The plain modules run, which is slower: {e}")
    more = copied_bytes(model, dtype, not encoder and runs_on_tiles(model, dtype, kernels))
    if more > 0.5 * room:
        text = f"its copy of the weights would take {more / 1e9:.1f} of the {max(room, 0) / 1e9:.1f} GB that are left"
        return Chosen(PLAIN, None, f"The plain modules run: {text}.")
    forward = FastBert(model, dtype, kernels) if encoder else FastLlama(model, dtype, kernels)
    name, how = ("tiles", "AMX tiles") if forward.tiles else ("torch", "torch's products")
    return Chosen(FAST, forward, f"The fast path runs, on {how}.", name)
