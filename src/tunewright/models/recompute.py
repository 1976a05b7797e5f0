"""Activation checkpointing: layers that keep only their input and are computed again in the backward.

Training deep nets with sublinear memory cost (Chen et al. 2016, arXiv 1604.06174). The same operations on the same
numbers, so results do not change by a bit; a step takes about a third longer when every layer is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from tunewright.ops.noise import keep_keys

# of how many layers in a row the last is recomputed
EVERY: dict[str, int] = {"none": 0, "selective": 2, "full": 1}


def set_checkpointing(model: nn.Module, choice: str) -> int:
    """Recompute `none` of the model's layers, every second one (`selective`) or all (`full`); returns how many.

    Works in training mode only. 0 for a model whose layers transformers does not mark.
    """
    every = EVERY[choice]
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    chosen = [every > 0 and i % every == every - 1 for i in range(len(layers))]
    for layer, wanted in zip(layers, chosen, strict=True):
        layer.gradient_checkpointing = wanted
        layer._gradient_checkpointing_func = partial(_again, layer)  # type: ignore[assignment]
    return sum(chosen)


def _again(layer: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    """What transformers calls in place of `forward`. The second time, too, draws the noise of this batch."""
    return checkpoint(keep_keys(layer, forward), *args, use_reentrant=False)
