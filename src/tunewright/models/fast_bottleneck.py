"""Bottleneck adapters as the fast path computes them: s * up(f(down(z))), added to what z came from or stands beside.

z: what a layer's last product says before the residual, or what its MLP reads (tuners/bottleneck.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPES: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    torch.relu: lambda g, a: torch.ops.aten.threshold_backward(g, a, 0),
    F.gelu: lambda g, a: torch.ops.aten.gelu_backward(g, a),
    F.silu: lambda g, a: torch.ops.aten.silu_backward(g, a),
}


class Bottleneck:
    """The bottleneck of one module. Its weights are kept in the dtype of the computation."""

    def __init__(self, around: Any, dtype: torch.dtype) -> None:
        self._around, self._dtype = around, dtype
        down, up = around.adapter_down, around.adapter_up
        self.own: list[nn.Parameter] = [down.weight, down.bias, up.weight, up.bias]
        self.refresh()

    @property
    def on(self) -> bool:
        return self._around.on

    @property
    def size(self) -> int:
        return self.own[0].shape[0]

    @property
    def trained(self) -> bool:
        return any(p.requires_grad for p in self.own)

    def trainable(self) -> list[nn.Parameter]:
        return self.own

    def parameters(self) -> list[nn.Parameter]:
        """What is trained and on, in the order of backward()'s gradients."""
        return [p for p in self.own if p.requires_grad] if self.on else []

    def refresh(self) -> None:
        """Take over the present values."""
        down, down_bias, up, up_bias = (p.detach() for p in self.own)
        scale = self._around.scale
        self._down_SD, self._down_bias_S = down.to(self._dtype), down_bias.to(self._dtype)
        self._up_DS, self._up_bias_D = (scale * up).to(self._dtype), (scale * up_bias).to(self._dtype)

    def add(self, z_ND: Tensor, to_ND: Tensor, a_NS: Tensor) -> None:
        """Add what it says of z to `to`; a: where the values before f go, for the backward."""
        torch.addmm(self._down_bias_S, z_ND, self._down_SD.T, out=a_NS)
        to_ND.addmm_(self._around.f(a_NS), self._up_DS.T).add_(self._up_bias_D)

    def backward(self, z_ND: Tensor, a_NS: Tensor, dy_ND: Tensor, dz_ND: Tensor) -> list[Tensor]:
        """dy: gradient of what it added to. Adds z's to dz; returns those of parameters(), float32."""
        h_NS, scale = self._around.f(a_NS), self._around.scale
        da_NS = SLOPES[self._around.f](dy_ND @ self._up_DS, a_NS)
        g_up, g_down = (dy_ND.T @ h_NS).float() * scale, (da_NS.T @ z_ND).float()
        g_up_bias, g_down_bias = dy_ND.float().sum(0) * scale, da_NS.float().sum(0)
        dz_ND.addmm_(da_NS, self._down_SD)
        found = [g_down, g_down_bias, g_up, g_up_bias]
        return [g for g, p in zip(found, self.own, strict=True) if p.requires_grad]


def unwrapped(layer: Any, dtype: torch.dtype) -> tuple[Any, Bottleneck | None]:
    """(the module itself, the bottleneck around it or None)."""
    if not hasattr(layer, "adapter_down"):
        return layer, None
    return layer.base_layer, Bottleneck(layer, dtype)


def add(b: Bottleneck | None, z_ND: Tensor | None, to_ND: Tensor, a_NS: Tensor | None) -> None:
    """Bottleneck.add, where there is one and it is on."""
    if b is not None and b.on and z_ND is not None and a_NS is not None:
        b.add(z_ND, to_ND, a_NS)


def behind(
    b: Bottleneck | None, z_ND: Tensor | None, a_NS: Tensor | None, dy_ND: Tensor, room_ND: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """(gradient of z, to which b added what it said of z, those of b's parameters()); dy itself where nothing did."""
    if b is None or not b.on or z_ND is None or a_NS is None:
        return dy_ND, []
    return room_ND, b.backward(z_ND, a_NS, dy_ND, room_ND.copy_(dy_ND))


def beside(
    b: Bottleneck | None, z_ND: Tensor | None, a_NS: Tensor | None, dy_ND: Tensor, dz_ND: Tensor
) -> list[Tensor]:
    """Add to dz, z's gradient from elsewhere, what comes through b; returns those of b's parameters()."""
    if b is None or not b.on or z_ND is None or a_NS is None:
        return []
    return b.backward(z_ND, a_NS, dy_ND, dz_ND)
