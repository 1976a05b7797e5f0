"""The weights of Llama-shaped layers as the fast path holds them: joined, and taken over when they change."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tunewright.models.fast_adapters import Gain, adapter_of, gains_of
from tunewright.models.fast_bottleneck import Bottleneck, unwrapped
from tunewright.models.fast_rotations import rotation_of
from tunewright.ops.kernels import Kernels
from tunewright.ops.logprob import TileHead
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
        reader: nn.Module | None = None,
    ) -> None:
        """inner: see ops.lora.Product; what goes `out` to the inner side of the MLP has gate and up in turns.
        reader: the layer that reads the last one's outputs, see gains_of()."""
        self.dtype = dtype
        self.plain: list[Any] = [x.get_base_layer() if isinstance(x, BaseTunerLayer) else x for x in layers]
        sizes = [layer.weight.shape[0] for layer in self.plain]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        rows: list[Tensor | slice] = [slice(a, a + n) for a, n in zip(starts, sizes, strict=True)]
        if inner == "out":
            order = interleave(*(torch.arange(s, s + n) for s, n in zip(starts, sizes, strict=True)))
            rows = [torch.nonzero((order >= s) & (order < s + n))[:, 0] for s, n in zip(starts, sizes, strict=True)]
        self.rows = rows
        self.adapters = [adapter_of(layer) for layer in layers]
        readers = [None] * (len(layers) - 1) + [reader]
        self.gains = [gains_of(layer, last) for layer, last in zip(layers, readers, strict=True)]
        self.rotations = [rotation_of(layer) for layer in layers]
        ranks = [adapter.rank if adapter else 0 for adapter in self.adapters]
        self.product = kind(kernels, [w.to(dtype) for w in self._weights()], ranks, rows, inner)
        self.adapted = any(self.adapters) or any(self.gains) or any(self.rotations)
        self.own = [p for layer in self.plain for p in (layer.weight, layer.bias) if p is not None]
        self.whole: list[nn.Parameter] = []  # those of its own that are, or were, trained
        self.notice()
        self.bias = self._bias()

    def notice(self) -> None:
        """Which of its own weights are trained may change from step to step."""
        known = {id(p) for p in self.whole}
        self.whole = [p for p in self.own if p.requires_grad or id(p) in known]

    @property
    def trained(self) -> bool:
        return self.adapted or any(p.requires_grad for p in self.whole)

    @property
    def reads(self) -> bool:
        """Whether a gradient needs what the product reads."""
        return any((*self.adapters, *self.rotations)) or any(layer.weight.requires_grad for layer in self.plain)

    def _weights(self) -> list[Tensor]:
        own = [layer.weight.detach() for layer in self.plain]
        return [turn.turn(w) if turn and turn.on else w for w, turn in zip(own, self.rotations, strict=True)]

    def _bias(self) -> Tensor | None:
        if all(layer.bias is None for layer in self.plain):
            return None
        bias = torch.zeros(self.product.n, dtype=self.dtype)
        for layer, rows in zip(self.plain, self.rows, strict=True):
            if layer.bias is not None:
                bias[rows] = layer.bias.detach().to(self.dtype)
        return bias

    def add_bias(self, *to: Tensor | None) -> None:
        """Add it to each, where there is one."""
        for y in to:
            if self.bias is not None and y is not None:
                y += self.bias

    def updates(self) -> list[LowRank | None]:
        """The low-rank matrices that are on at present."""
        return [adapter.update() if adapter else None for adapter in self.adapters]

    def places(self) -> tuple[Any, ...]:
        """What is on at present: where its matrices lie in memory, their scales, and whether gains are."""
        found = [u for u in self.updates() if u is not None]
        turned = (turn.on for turn in self.rotations if turn)
        return (*(x for u in found for x in (u.a.data_ptr(), u.b.data_ptr(), u.scale)), self._gains_on(), *turned)

    def _gains(self) -> list[tuple[Gain, Tensor | slice]]:
        """Each with its rows of the product."""
        return [(gain, rows) for gains, rows in zip(self.gains, self.rows, strict=True) for gain in gains]

    def _gains_on(self) -> bool:
        return any(gain.on for gain, _ in self._gains())

    def switch(self) -> None:
        """Let the product have what is on at present; refresh() takes over the values."""
        self.product.set_updates(self.updates(), torch.ones(self.product.n) if self._gains_on() else None)

    def refresh(self) -> None:
        """Take over the present values of what is trained."""
        for adapter in filter(None, self.adapters):
            adapter.refresh()
        if self.product.gain is not None:
            self.product.gain.fill_(1)
            for gain, rows in self._gains():
                self.product.gain[rows] *= gain.value()
        self.product.refresh()
        if self.whole or any(self.rotations):
            self.product.set_weights(self._weights())
            self.bias = self._bias()

    def added(self) -> list[nn.Parameter]:
        """Of adapters, on or off."""
        low = [p for adapter in self.adapters if adapter for p in adapter.parameters]
        return low + [gain.parameter for gain, _ in self._gains()] + [t.parameter for t in self.rotations if t]

    def trainable(self) -> list[nn.Parameter]:
        """All that may change, what is off or frozen at present included."""
        return self.added() + self.whole

    def parameters(self) -> list[nn.Parameter]:
        """What is trained and on, in the order of gradients()."""
        return (self.added() if self._is_on() else []) + [p for p in self.whole if p.requires_grad]

    def _is_on(self) -> bool:
        turned = any(turn and turn.on for turn in self.rotations)
        return turned or self.product.gain is not None or any(u is not None for u in self.product.updates)

    def before_gain(self, dy: Tensor, y: Tensor | None, dz: Tensor) -> tuple[Tensor, Tensor | None]:
        """(the gradient of the product before its gains, sum of dy * y over the tokens); without gains (dy, None).

        y: its output without bias or residual. dz: memory for the first, may be dy."""
        if self.product.gain is None or y is None:
            return dy, None
        return dz, self.product.before_gain(dy, y, dz)

    def gradients(
        self, x: Tensor | None, u: Tensor, dy: Tensor, du: Tensor, sums: Tensor | None = None
    ) -> list[Tensor]:
        """Of parameters(), float32. x: may be None where it is not needed (`reads`). dy, sums: of before_gain()."""
        low = self.product.gradients(x, u, dy, du) if x is not None and any(self.adapters) else []
        return self.of_parameters(low, sums) + self._of_rotations(x, dy) + self._of_whole(x, dy)

    def of_parameters(self, low: Sequence[tuple[Tensor, Tensor] | None], sums: Tensor | None) -> list[Tensor]:
        """Of the updates and gains that are on, from the product's own gradients and the sums of before_gain()."""
        pairs = [(adapter, pair) for adapter, pair in zip(self.adapters, low, strict=bool(low)) if adapter and pair]
        found = [g for adapter, pair in pairs for g in adapter.gradients(*pair)]
        if sums is None:
            return found
        return found + [gain.gradient(sums[rows]) for gain, rows in self._gains()]

    def _of_rotations(self, x: Tensor | None, dy: Tensor) -> list[Tensor]:
        pairs = zip(self.plain, self.rotations, strict=True)
        return [
            turn.gradient(layer.weight.detach(), self.product.weight_gradient(i, x, dy))
            for i, (layer, turn) in enumerate(pairs)
            if turn and turn.on and x is not None
        ]

    def _of_whole(self, x: Tensor | None, dy: Tensor) -> list[Tensor]:
        found = []
        sums = self.product.column_sums(dy) if any(_is_trained(layer.bias) for layer in self.plain) else dy
        for i, (layer, rows) in enumerate(zip(self.plain, self.rows, strict=True)):
            if x is not None and _is_trained(layer.weight):
                found.append(self.product.weight_gradient(i, x, dy))
            if _is_trained(layer.bias):
                found.append(sums[rows])
        return found


def _is_trained(p: Tensor | None) -> bool:
    return p is not None and p.requires_grad


class Norm:
    """The weight of an RMSNorm, in float32 whatever the computation has."""

    def __init__(self, module: Any) -> None:
        self.parameter: nn.Parameter = module.weight
        self.own = [self.parameter]
        self.refresh()

    @property
    def trained(self) -> bool:
        return self.parameter.requires_grad

    def trainable(self) -> list[nn.Parameter]:
        return self.own

    def refresh(self) -> None:
        self.weight = self.parameter.detach().float()


class Layer:
    """The weights of one decoder layer."""

    def __init__(self, kind: type[Product], kernels: Kernels, layer: Any, dtype: torch.dtype) -> None:
        attention = layer.self_attn
        mlp, self.beside = unwrapped(layer.mlp, dtype)
        o, self.after_o = unwrapped(attention.o_proj, dtype)
        down, self.after_down = unwrapped(mlp.down_proj, dtype)
        self.qkv = Linear(kind, kernels, dtype, [attention.q_proj, attention.k_proj, attention.v_proj])
        self.o = Linear(kind, kernels, dtype, [o])
        self.gate_up = Linear(kind, kernels, dtype, [mlp.gate_proj, mlp.up_proj], "out", down)
        self.down = Linear(kind, kernels, dtype, [down], "in")
        self.norm1 = Norm(layer.input_layernorm)
        self.norm2 = Norm(layer.post_attention_layernorm)
        self._on_tiles = kind is TileProduct

    @property
    def one_call(self) -> bool:
        """Whether it is one call of the kernels in each direction (layer.h): with nothing but adapters,
        and biases of q, k and v alone."""
        whole = any(linear.whole for linear in self.linears) or any(norm.trained for norm in self.norms)
        biases = any(linear.bias is not None for linear in (self.o, self.gate_up, self.down))
        turned = any(any(linear.rotations) for linear in self.linears)
        return self._on_tiles and not (whole or biases or turned or self.bottlenecks)

    @property
    def bottlenecks(self) -> list[Bottleneck]:
        """In the order of their gradients."""
        return [b for b in (self.after_o, self.beside, self.after_down) if b is not None]

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.qkv, self.o, self.gate_up, self.down)

    @property
    def norms(self) -> tuple[Norm, ...]:
        return (self.norm1, self.norm2)

    @property
    def trained(self) -> bool:
        return any(part.trained for part in (*self.linears, *self.norms, *self.bottlenecks))

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in the order of the gradients."""
        parts = (*self.linears, *self.bottlenecks)
        return [p for part in parts for p in part.parameters()] + norm_parameters(self.norms)

    def update_record(self) -> None:
        """Its weights as a struct of C (layer.h, LayerWeights)."""
        if not self.one_call:
            return
        products: list[Any] = [linear.product for linear in self.linears]
        places = [t for p in products for t in (p.record, p.addresses)] + [norm.weight for norm in self.norms]
        bias = self.qkv.bias
        self.record = torch.tensor([*(t.data_ptr() for t in places), 0 if bias is None else bias.data_ptr()])

    @property
    def input_columns(self) -> int:
        """Columns of the inputs of its products that the backward makes again."""
        return self.qkv.product.k + self.gate_up.product.k + self.down.product.k

    @property
    def scratch_columns(self) -> int:
        """Columns that the backward takes of its scratch memory."""
        narrow = sum(linear.product.r for linear in self.linears)
        return self.gate_up.product.n + 3 * self.gate_up.product.k + self.o.product.k + self.qkv.product.n + narrow

    @property
    def kept_columns(self) -> int:
        """Columns of all that the backward needs of the forward, but x."""
        wide = self.qkv.product.n + self.o.product.k + self.o.product.n + self.gate_up.product.n
        alone = sum(self.alone) * self.o.product.n
        narrow = sum(linear.product.r for linear in self.linears) + sum(b.size for b in self.bottlenecks)
        return wide + alone + narrow

    @property
    def alone(self) -> list[bool]:
        """Whether what o and down add to the residual is kept by itself."""
        ends = ((self.o, self.after_o), (self.down, self.after_down))
        return [linear.product.gain is not None or after is not None for linear, after in ends]

    @property
    def gradient_sizes(self) -> list[int]:
        return [n for linear in self.linears for n in linear.product.gradient_sizes]  # type: ignore[attr-defined]

    def split_gradients(self, found: Tensor) -> list[Tensor]:
        """Of parameters(), from what the kernels wrote."""
        parts, grads = iter(found.split(self.gradient_sizes)), []
        for linear in self.linears:
            product: Any = linear.product
            own = list(islice(parts, len(product.gradient_sizes)))
            sums = own.pop() if product.gain is not None else None
            grads += linear.of_parameters(product.split_gradients(own), sums)
        return grads


def norm_parameters(norms: Sequence[Norm]) -> list[nn.Parameter]:
    return [norm.parameter for norm in norms if norm.trained]


class Values:
    """Which values of the trained weights count at present. seen: what says so; it changes with each of them."""

    def __init__(self, layers: Sequence[Layer], norm: Norm, head: TileHead | None) -> None:
        self._layers = layers
        self._linears = [linear for layer in layers for linear in layer.linears]
        self._norms = [*(own for layer in layers for own in layer.norms), norm]
        self._bottlenecks = [b for layer in layers for b in layer.bottlenecks]
        self._heads = [head] if head is not None and head.weight.requires_grad else []
        self._all = (*self._linears, *self._norms, *self._bottlenecks)
        self._own = [p for part in self._all for p in part.own]
        # a checkpoint may be loaded, and what is trained may be frozen, before the first call
        self._parts: list[Any] = [part for part in self._all if part.trained]
        self._trained: list[Tensor] = []
        self.seen: tuple[Any, ...] = ()

    @torch.autocast("cpu", enabled=False)  # what is derived from the weights must not depend on who asks
    def refresh(self) -> None:
        """Take over what an optimizer, a load or a switch changed since the last call."""
        on = self._on()
        if not self.seen or on != self.seen[0]:
            self._switch()
        values = tuple(p._version for p in self._trained)
        if (on, values) == self.seen:
            return
        for part in self._parts:
            part.refresh()
        self.seen = (on, values)

    def require(self, seen: tuple[Any, ...]) -> None:
        """Have those values that a forward used, after a switch was off and on again in between.

        Raises RuntimeError if the weights themselves have changed since.
        """
        self.refresh()
        if self.seen != seen:
            raise RuntimeError("the trained weights changed between the forward and its backward")

    def _on(self) -> tuple[Any, ...]:
        """Which adapters are on, and which weights are trained: half fine-tuning changes that between steps."""
        places = [linear.places() for linear in self._linears if linear.adapted]
        return *places, *(b.on for b in self._bottlenecks), *(p.requires_grad for p in self._own)

    def _switch(self) -> None:
        """Take over what _on() says. What was ever trained is looked after from then on."""
        for linear in self._linears:
            linear.notice()
            linear.switch()
        for layer in self._layers:
            layer.update_record()
        parts = [part for part in self._all if part.trained or part in self._parts]
        self._trained = [p for part in parts for p in part.trainable()] + [head.weight for head in self._heads]
        self._parts = [*parts, *self._heads]
