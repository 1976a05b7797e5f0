"""Loss scaling for float16: small gradients are zero there unless the loss is multiplied first.

Mixed precision training (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2), dynamic: the scale halves when a
gradient overflows and doubles after 2,000 steps without. All scales are powers of two, so scaling rounds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from tunewright.train.checkpoint import State

FIRST, SMALLEST, LARGEST = 2.0**16, 2.0, 2.0**24  # 1 is no scaling
GROW_AFTER = 2000


def start(state: State, dtype: str) -> None:
    """Give a new job its first scale; a resumed one has it from its checkpoint."""
    if state.step == 0:
        state.loss_scale = FIRST if dtype == "float16" else 1.0


@torch.no_grad()
def unscale(parameters: Iterable[nn.Parameter], state: State) -> bool:
    """Divide the gradients by the scale. If one is not finite and a smaller scale may help: halve it, return False."""
    if state.loss_scale == 1.0:
        return True
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if state.loss_scale > SMALLEST and not torch.isfinite(norm):
        state.loss_scale, state.well_scaled = state.loss_scale / 2, 0
        return False
    for grad in grads:
        grad.mul_(1 / state.loss_scale)
    return True


def grow(state: State) -> None:
    """Count a good step, and double the scale when it is due."""
    if state.loss_scale == 1.0:
        return
    state.well_scaled += 1
    if state.well_scaled >= GROW_AFTER and state.loss_scale < LARGEST:
        state.loss_scale, state.well_scaled = state.loss_scale * 2, 0


def clip(parameters: list[torch.nn.Parameter], limit: float) -> float:
    """Scale the gradients down to the norm `limit`; returns the norm before. torch's clip_grad_norm_ without its pass
    over all gradients where that would multiply them by 1."""
    total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = float(total)
    if not norm + 1e-6 <= limit:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, total)
    return norm
