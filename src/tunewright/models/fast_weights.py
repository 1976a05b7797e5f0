"""The weights of Llama-shaped layers as the fast path holds them: joined, and taken over when they change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tunewright.ops.kernels import Kernels
from tunewright.ops.lora import Inner, LowRank, Product, TileProduct, interleave


class Room:
    """One piece of memory for many matrices of equally many rows: asking for each of them would cost more than it."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.rows = rows
        self.flat = torch.empty(rows * columns, dtype=dtype)
        self.at = 0

    def take(self, columns: int) -> Tensor:
        """[rows, columns], not initialised."""
        size = self.rows * columns
        self.at += size
        return self.flat[self.at - size : self.at].view(self.rows, columns)


class Linear:
    """One or more layers of a block that read the same input, as one product."""

    def __init__(
        self,
        kind: type[Product],
        kernels: Kernels,
        dtype: torch.dtype,
        layers: Sequence[nn.Module],
        inner: Inner = "",
    ) -> None:
        """inner: see ops.lora.Product; what goes `out` to the inner side of the MLP has gate and up in turns."""
        self.layers, self.dtype = layers, dtype
        self.plain: list[Any] = [x.get_base_layer() if isinstance(x, LoraLayer) else x for x in layers]
        sizes = [layer.weight.shape[0] for layer in self.plain]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        rows: list[Tensor | slice] = [slice(a, a + n) for a, n in zip(starts, sizes, strict=True)]
        if inner == "out":
            order = interleave(*(torch.arange(s, s + n) for s, n in zip(starts, sizes, strict=True)))
            rows = [torch.nonzero((order >= s) & (order < s + n))[:, 0] for s, n in zip(starts, sizes, strict=True)]
        self.rows = rows
        ranks = [layer.r[layer.active_adapters[0]] if isinstance(layer, LoraLayer) else 0 for layer in layers]  # type: ignore[operator]
        self.product = kind(kernels, [w.to(dtype) for w in self._weights()], ranks, rows, inner)
        self.whole = [p for layer in self.plain for p in (layer.weight, layer.bias) if _is_trained(p)]
        self.low = [_low_rank(layer) for layer in layers]
        self.low_rank = any(self.low)
        self.bias = self._bias()

    def _weights(self) -> list[Tensor]:
        return [layer.weight.detach() for layer in self.plain]

    def _bias(self) -> Tensor | None:
        if self.plain[0].bias is None:
            return None
        return torch.cat([layer.bias.detach().to(self.dtype) for layer in self.plain])

    @property
    def trained(self) -> bool:
        return self.low_rank or bool(self.whole)

    def updates(self) -> list[LowRank | None]:
        """The low-rank matrices that are on at present."""
        return [
            None
            if low is None or layer.disable_adapters
            else replace(low, scale=layer.scaling[layer.active_adapters[0]])  # type: ignore[index]
            for low, layer in zip(self.low, self.layers, strict=True)
        ]

    def places(self) -> tuple[Any, ...]:
        """Where the matrices that are on at present lie in memory, and their scales."""
        return tuple(
            value for u in self.updates() if u is not None for value in (u.a.data_ptr(), u.b.data_ptr(), u.scale)
        )

    def all_parameters(self) -> list[nn.Parameter]:
        """What is trained, updates that are off included."""
        return [p for low in self.low if low is not None for p in (low.a, low.b)] + self.whole  # type: ignore[misc]

    def refresh(self) -> None:
        """Take over the present values of whole weights that are trained."""
        if self.whole:
            self.product.set_weights(self._weights())
            self.bias = self._bias()

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in the order of gradients()."""
        return [p for u in self.product.updates if u is not None for p in (u.a, u.b)] + self.whole  # type: ignore[misc]

    def gradients(self, x: Tensor | None, u: Tensor, dy: Tensor, du: Tensor) -> list[Tensor]:
        """Of parameters(), float32. x: may be None where nothing is trained."""
        if x is None:
            return []
        low = self.product.gradients(x, u, dy, du) if self.low_rank else []
        found = [g for pair in low if pair is not None for g in pair]
        if not self.whole:
            return found
        weights = self.product.weight_gradient(x, dy)
        sums = self.product.column_sums(dy) if any(_is_trained(layer.bias) for layer in self.plain) else dy
        for layer, rows in zip(self.plain, self.rows, strict=True):
            if _is_trained(layer.weight):
                found.append(weights[rows])
            if _is_trained(layer.bias):
                found.append(sums[rows])
        return found


def _is_trained(p: Tensor | None) -> bool:
    return p is not None and p.requires_grad


def _low_rank(layer: nn.Module) -> LowRank | None:
    if not isinstance(layer, LoraLayer):
        return None
    name = layer.active_adapters[0]
    return LowRank(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])  # type: ignore[arg-type]


class Norm:
    """The weight of an RMSNorm, in float32 whatever the computation has."""

    def __init__(self, module: Any) -> None:
        self.parameter = module.weight
        self.trained = self.parameter.requires_grad
        self.refresh()

    def refresh(self) -> None:
        self.weight = self.parameter.detach().float()


class Layer:
    """The weights of one decoder layer."""

    def __init__(self, kind: type[Product], kernels: Kernels, layer: Any, dtype: torch.dtype) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = Linear(kind, kernels, dtype, [attention.q_proj, attention.k_proj, attention.v_proj])
        self.o = Linear(kind, kernels, dtype, [attention.o_proj])
        self.gate_up = Linear(kind, kernels, dtype, [mlp.gate_proj, mlp.up_proj], "out")
        self.down = Linear(kind, kernels, dtype, [mlp.down_proj], "in")
        self.norm1 = Norm(layer.input_layernorm)
        self.norm2 = Norm(layer.post_attention_layernorm)
        whole = any(linear.whole for linear in self.linears) or any(norm.trained for norm in self.norms)
        self.one_call = kind is TileProduct and not whole

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.qkv, self.o, self.gate_up, self.down)

    @property
    def norms(self) -> tuple[Norm, ...]:
        return (self.norm1, self.norm2)

    @property
    def trained(self) -> bool:
        return any(part.trained for part in (*self.linears, *self.norms))

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in the order of the gradients."""
        return [p for linear in self.linears for p in linear.parameters()] + norm_parameters(self.norms)

    # ---- where a layer is one call of the kernels (layer.h)

    def update_record(self) -> None:
        """Its weights as a struct of C (layer.h, LayerWeights)."""
        if not self.one_call:
            return
        products: list[Any] = [linear.product for linear in self.linears]
        places = [t for p in products for t in (p.record, p.addresses)] + [norm.weight for norm in self.norms]
        bias = self.qkv.bias
        self.record = torch.tensor([*(t.data_ptr() for t in places), 0 if bias is None else bias.data_ptr()])

    @property
    def kept_columns(self) -> int:
        """Columns of all that the backward needs of the forward, but x."""
        wide = self.qkv.product.n + self.o.product.k + self.o.product.n + self.gate_up.product.n
        return wide + sum(linear.product.r for linear in self.linears)

    @property
    def gradient_sizes(self) -> list[int]:
        return [n for linear in self.linears for n in linear.product.gradient_sizes]  # type: ignore[attr-defined]

    def split_gradients(self, found: Tensor) -> list[Tensor]:
        """Of parameters(), from what the kernels wrote."""
        parts, grads = iter(found.split(self.gradient_sizes)), []
        for linear in self.linears:
            own = list(islice(parts, 1 + len(linear.layers)))
            pairs = linear.product.split_gradients(own)  # type: ignore[attr-defined]
            grads += [g for pair in pairs if pair is not None for g in pair]
        return grads


def norm_parameters(norms: Sequence[Norm]) -> list[nn.Parameter]:
    return [norm.parameter for norm in norms if norm.trained]
