"""What adapters add to a layer, as the fast path computes it: low-rank updates, and trained factors of outputs.

AdaLoRA's update B (E * A) is one of low rank whose A is E * A, VeRA's one of b * B and d * A. DoRA and IA3 multiply a
layer's outputs by numbers, here called gains: y = gain * z. As y is proportional to the trained number p that its gain
comes from (DoRA's norm gets no gradient), that number's gradient is the sum of dy * y over the tokens, divided by p: z
need not be kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.tuners.vera.layer import VeraLayer
from torch import Tensor, nn

from tunewright.ops.lora import LowRank

ADALORA_EPS = 1e-5  # peft's addition to the rank in AdaLoRA's scale


class Adapter(Protocol):
    """The low-rank update of one layer. parameters: in the order of gradients()."""

    @property
    def parameters(self) -> list[nn.Parameter]: ...

    @property
    def rank(self) -> int: ...

    def update(self) -> LowRank | None:
        """What is on at present."""
        ...

    def refresh(self) -> None:
        """Take over the present values."""
        ...

    def gradients(self, da: Tensor, db: Tensor) -> list[Tensor]:
        """Of parameters, from those of what the product read."""
        ...


class LoraAdapter:
    """peft's A [r, k] and B [n, r], and AdaLoRA's E [r, 1]."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._name = layer, layer.active_adapters[0]
        a, b = layer.lora_A[self._name], layer.lora_B[self._name]
        self.e: nn.Parameter | None = layer.lora_E[self._name] if hasattr(layer, "lora_E") else None
        self.a, self.b = (a.weight, b.weight) if self.e is None else (a, b)
        self._read = self.a if self.e is None else torch.empty_like(self.a)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.a, self.b] if self.e is None else [self.a, self.b, self.e]

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def update(self) -> LowRank | None:
        if self._layer.disable_adapters:
            return None
        scale = self._layer.scaling[self._name]
        if self.e is not None:
            scale /= float(self._layer.ranknum[self._name]) + ADALORA_EPS
        return LowRank(self._read, self.b, scale)

    def refresh(self) -> None:
        if self.e is not None:
            torch.mul(self.a.detach(), self.e.detach(), out=self._read)

    def gradients(self, da: Tensor, db: Tensor) -> list[Tensor]:
        if self.e is None:
            return [da, db]
        return [da * self.e.detach(), db, (da * self.a.detach()).sum(1, keepdim=True)]


class VeraAdapter:
    """VeRA's vectors d [r] and b [n], over the first columns of A and rows of B that all layers share."""

    def __init__(self, layer: Any) -> None:
        name = layer.active_adapters[0]
        self._layer = layer
        self.parameters: list[nn.Parameter] = [layer.vera_lambda_d[name], layer.vera_lambda_b[name]]
        self._a, self._b = layer.vera_A[name][:, : layer.in_features], layer.vera_B[name][: layer.out_features]
        self._read = LowRank(torch.empty(self._a.shape), torch.empty(self._b.shape), 1.0)

    @property
    def rank(self) -> int:
        return self._a.shape[0]

    def update(self) -> LowRank | None:
        return None if self._layer.disable_adapters else self._read

    def refresh(self) -> None:
        d, b = (p.detach()[:, None] for p in self.parameters)
        torch.mul(self._a, d, out=self._read.a)
        torch.mul(self._b, b, out=self._read.b)

    def gradients(self, da: Tensor, db: Tensor) -> list[Tensor]:
        return [(da * self._a).sum(1), (db * self._b).sum(1)]


@dataclass(frozen=True)
class Gain:
    """Trained factors of one layer's outputs. layer: the module of peft that has them. value(): [n], the factors."""

    layer: Any
    parameter: nn.Parameter
    value: Callable[[], Tensor]

    @property
    def on(self) -> bool:
        return not self.layer.disable_adapters

    def gradient(self, sums: Tensor) -> Tensor:
        """sums: [n], of dy * y over the tokens. A number that is exactly 0 hides its outputs and gets none."""
        p = self.parameter.detach().flatten()
        return torch.where(p == 0, 0, sums / p).view_as(self.parameter)


_ADAPTERS: dict[type, Callable[[Any], Adapter]] = {LoraLayer: LoraAdapter, VeraLayer: VeraAdapter}


def adapter_of(layer: nn.Module) -> Adapter | None:
    return next((make(layer) for kind, make in _ADAPTERS.items() if isinstance(layer, kind)), None)


def gains_of(layer: nn.Module, reader: nn.Module | None = None) -> list[Gain]:
    """The gains of a layer's outputs. reader: the layer that reads them times other numbers only (the MLP's last one
    reads up's outputs, silu(gate) * up), so that factors of its inputs are gains here."""
    found = []
    if getattr(layer, "lora_magnitude_vector", None):
        found.append(_dora(layer))
    if isinstance(layer, IA3Layer) and not layer.is_feedforward:
        found.append(_ia3(layer))
    if isinstance(reader, IA3Layer) and reader.is_feedforward:
        found.append(_ia3(reader))
    return found


def _dora(layer: Any) -> Gain:
    name = layer.active_adapters[0]
    return Gain(layer, layer.lora_magnitude_vector[name].weight, partial(_lengthened, layer, name))


def _lengthened(layer: Any, name: str) -> Tensor:
    """DoRA's m / ||W + s B A|| by row (tuners/dora.py)."""
    vector, weight = layer.lora_magnitude_vector[name], layer.get_base_layer().weight.detach()
    a, b = (matrices[name].weight.detach() for matrices in (layer.lora_A, layer.lora_B))
    return vector.weight.detach() / vector.norm(weight, a, b, layer.scaling[name])


def _ia3(layer: Any) -> Gain:
    parameter = layer.ia3_l[layer.active_adapters[0]]
    return Gain(layer, parameter, lambda: parameter.detach().flatten())
