"""BERT's layers (MiniLM, bert-base …) as one function over packed rows, when all of its weights are trained on a CPU.

The same numbers as the modules under autocast: weights are brought down to the dtype of the products once a step,
query, key and value are one product, GELU and biases come with the products, and the gradient of the word embeddings is
added to one matrix that stays, of which only the rows of the last step are cleared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunewright.models.fast_attention import BOTH_WAYS, Heads, Segments, TileAttention, TorchAttention
from tunewright.models.fast_serves import head_dim, tiles_fit
from tunewright.models.fast_weights import Linear, Room
from tunewright.models.layouts import PACKED, causal_lm, layout_of
from tunewright.ops.kernels import Kernels
from tunewright.ops.logprob import TileHead
from tunewright.ops.lora import TileProduct, TorchProduct, padded
from tunewright.ops.types import Batch


def serves(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether FastBert computes this model."""
    lm: Any = causal_lm(model)
    config = lm.config
    return (
        lm is model
        and config.model_type == "bert"
        and layout_of(model) == PACKED
        and config.hidden_act == "gelu"
        and not config.is_decoder
        and not config.add_cross_attention
        and dtype in (torch.float32, torch.bfloat16)
        and all(p.requires_grad and p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())
    )


class FastBert:
    """What Policy takes as `fast`. dtype: of the products; sums, norms and the residual stream are float32."""

    shares_prefixes = False

    def __init__(self, model: nn.Module, dtype: torch.dtype, kernels: Kernels) -> None:
        body: Any = getattr(model, "bert")  # noqa: B009
        self.checkpointing = "none"
        self.head: TileHead | None = None
        self.dtype = dtype
        self.tiles = kernels.tiles and dtype == torch.bfloat16 and tiles_fit(body.config)
        n = body.config.num_attention_heads
        heads = Heads(n, n, head_dim(body.config), BOTH_WAYS)
        attend = TileAttention(kernels, heads) if self.tiles else TorchAttention(heads)
        self.embeddings = Embeddings(body.embeddings)
        kind = TileProduct if self.tiles else TorchProduct
        self.layers = [Layer(kind, kernels, layer, attend, dtype) for layer in body.encoder.layer]
        self.parameters = [*self.embeddings.parameters, *(p for layer in self.layers for p in layer.parameters)]
        self._seen: tuple[int, ...] = ()

    def __call__(self, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """[T, D] float32: the last layer's output, or of these rows only."""
        with torch.autocast("cpu", enabled=False):
            self._refresh()
            grown = torch.is_grad_enabled()
            out_TD: Tensor = _Encoder.apply(self, batch, *self.parameters) if grown else self.forward(batch, False)[0]  # type: ignore[assignment]
            return out_TD if rows is None else out_TD[rows]

    def _refresh(self) -> None:
        """Take over the present weights."""
        values = tuple(p._version for p in self.parameters)
        if values != self._seen:
            for layer in self.layers:
                layer.refresh()
            self._seen = values

    def forward(self, batch: Batch, keep: bool) -> tuple[Tensor, list[Any]]:
        """([T, D], for the backward: of the embeddings' norm, then of each layer)."""
        n, at = batch.n_tokens, _segments(batch)
        x_TD, norm = self.embeddings.forward(batch)
        x_TD, saved = F.pad(x_TD, (0, 0, 0, padded(n) - n)), list[Any]([norm])
        for i, layer in enumerate(self.layers):
            out_TD, kept = layer.forward(x_TD, at)
            if keep:
                again = {"none": False, "selective": i % 2 == 1, "full": True}[self.checkpointing]
                saved.append(x_TD if again else kept)
            x_TD = out_TD
        return x_TD[:n], saved

    def backward(self, d_TD: Tensor, batch: Batch, saved: list[Any]) -> list[Tensor | None]:
        """Gradients of `parameters`. `saved` is emptied on the way."""
        n, at = batch.n_tokens, _segments(batch)
        d_TD, found = F.pad(d_TD, (0, 0, 0, padded(n) - n)), []
        for layer in reversed(self.layers):
            kept = saved.pop()
            if isinstance(kept, Tensor):
                kept = layer.forward(kept, at)[1]
            d_TD, gradients = layer.backward(d_TD, kept, at)
            found[:0] = gradients
        return [*self.embeddings.backward(d_TD[:n], batch, saved.pop()), *found]


def _segments(batch: Batch) -> Segments:
    return Segments(batch.n_tokens, batch.cu_seqlens.to(torch.int64), None, batch.cu_seqlens.tolist(), None)


class _Encoder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fast: FastBert, batch: Batch, *_: Tensor) -> Tensor:
        out_TD, ctx.saved = fast.forward(batch, keep=True)
        ctx.fast, ctx.batch = fast, batch
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_TD: Tensor) -> Any:  # type: ignore[override]
        return None, None, *ctx.fast.backward(d_TD, ctx.batch, ctx.saved)


@dataclass(frozen=True)
class Normed:
    """What a LayerNorm's backward needs: its input [T, D], [T, 1] means and 1 / standard deviations."""

    x: Tensor
    mean: Tensor
    rstd: Tensor


class Norm:
    def __init__(self, module: Any) -> None:
        self.weight, self.bias, self.eps = module.weight, module.bias, module.eps
        self.parameters = [self.weight, self.bias]

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Normed]:
        out, mean, rstd = torch.native_layer_norm(x_TD, self.weight.shape, self.weight, self.bias, self.eps)
        return out, Normed(x_TD, mean, rstd)

    def backward(self, d_TD: Tensor, of: Normed) -> list[Tensor]:
        """Gradients of the input, the weight and the bias."""
        return torch.ops.aten.native_layer_norm_backward(
            d_TD, of.x, self.weight.shape, of.mean, of.rstd, self.weight, self.bias, [True, True, True]
        )


class Embeddings:
    """Words, positions and token types, summed and normed."""

    def __init__(self, module: Any) -> None:
        self.words: nn.Parameter = module.word_embeddings.weight
        self.skipped: int | None = module.word_embeddings.padding_idx  # its row gets no gradient
        self.others = [module.position_embeddings.weight, module.token_type_embeddings.weight]
        self.norm = Norm(module.LayerNorm)
        self.parameters = [self.words, *self.others, *self.norm.parameters]
        self.gradient: Tensor | None = None
        self.touched: Tensor | None = None

    def forward(self, batch: Batch) -> tuple[Tensor, Normed]:
        (positions, types), (at_T, type_T) = self.others, self._others(batch)
        x_TD = F.embedding(batch.tokens_T, self.words) + F.embedding(type_T, types)
        return self.norm.forward(x_TD + F.embedding(at_T, positions))

    def _others(self, batch: Batch) -> tuple[Tensor, Tensor]:
        types_T = torch.zeros_like(batch.tokens_T) if batch.types_T is None else batch.types_T
        return batch.position_T, types_T

    def backward(self, d_TD: Tensor, batch: Batch, of: Normed) -> list[Tensor | None]:
        """Gradients of the parameters; that of the words goes to their `grad` at once."""
        d_TD, weight, bias = self.norm.backward(d_TD, of)
        others = [
            torch.zeros_like(p).index_add_(0, i, d_TD) for p, i in zip(self.others, self._others(batch), strict=True)
        ]
        self._add_words(d_TD, batch.tokens_T)
        return [None, *others, weight, bias]

    def _add_words(self, d_TD: Tensor, tokens_T: Tensor) -> None:
        if self.skipped is not None:
            d_TD = d_TD.masked_fill((tokens_T == self.skipped)[:, None], 0.0)
        if self.words.grad is not None and self.words.grad is not self.gradient:
            self.words.grad.index_add_(0, tokens_T, d_TD)
            return
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.words)
        elif self.words.grad is None and self.touched is not None:
            self.gradient.index_fill_(0, self.touched, 0.0)
            self.touched = None
        self.touched = tokens_T if self.touched is None else torch.cat([self.touched, tokens_T])
        self.words.grad = self.gradient.index_add_(0, tokens_T, d_TD)


@dataclass(frozen=True)
class Kept:
    """What a layer's backward needs of its forward, [T, ...] in the dtype of the products.

    x, middle: what attention and MLP read. wide: the MLP's inner side before GELU. seen: of the attention's forward.
    """

    x: Tensor
    qkv: Tensor
    seen: Any
    attended: Tensor
    normed1: Normed
    middle: Tensor
    wide: Tensor
    normed2: Normed


class Layer:
    """Attention and MLP of one layer, each with a residual and a norm after it."""

    def __init__(self, kind: Any, kernels: Kernels, module: Any, attend: Any, dtype: torch.dtype) -> None:
        attention, own = module.attention, module.attention.self
        self.attend, self.dtype = attend, dtype
        self.qkv: Any = Linear(kind, kernels, dtype, [own.query, own.key, own.value])
        self.o: Any = Linear(kind, kernels, dtype, [attention.output.dense])
        self.up: Any = Linear(kind, kernels, dtype, [module.intermediate.dense])
        self.down: Any = Linear(kind, kernels, dtype, [module.output.dense])
        self.norm1, self.norm2 = Norm(attention.output.LayerNorm), Norm(module.output.LayerNorm)
        self.linears = (self.qkv, self.o, self.up, self.down)
        whole = [p for linear in self.linears for p in linear.whole]
        self.parameters = [*whole, *self.norm1.parameters, *self.norm2.parameters]

    def refresh(self) -> None:
        for linear in self.linears:
            linear.refresh()

    def forward(self, x_TD: Tensor, at: Segments) -> tuple[Tensor, Kept]:
        """[T, D] float32, and what backward() needs."""
        t, d = x_TD.shape
        m, none = self.up.product.n, torch.empty(t, 0, dtype=self.dtype)
        room = Room(t, 3 * d + d + m, self.dtype)
        qkv_TN, attended_TD, wide_TM = room.take(3 * d), room.take(d), room.take(m)
        scratch = Room(t, d + m, self.dtype)
        added_TD, active_TM = scratch.take(d), scratch.take(m)
        low_TD = x_TD.to(self.dtype)
        self.qkv.product.forward(low_TD, none, qkv_TN, "bias", self.qkv.bias)
        seen = self.attend.forward(qkv_TN, attended_TD, at)
        self.o.product.forward(attended_TD, none, added_TD, "bias", self.o.bias)
        middle_TD, normed1 = self.norm1.forward(x_TD + added_TD)
        low_middle_TD = middle_TD.to(self.dtype)
        self.up.product.forward(low_middle_TD, none, wide_TM, "gelu", self.up.bias, active_TM)
        self.down.product.forward(active_TM, none, added_TD, "bias", self.down.bias)
        out_TD, normed2 = self.norm2.forward(middle_TD + added_TD)
        return out_TD, Kept(low_TD, qkv_TN, seen, attended_TD, normed1, low_middle_TD, wide_TM, normed2)

    def backward(self, d_TD: Tensor, k: Kept, at: Segments) -> tuple[Tensor, list[Tensor]]:
        """(gradient of the input, gradients of the parameters)."""
        t, d = d_TD.shape
        none = torch.empty(t, 0, dtype=self.dtype)
        room = Room(t, 2 * self.up.product.n + 5 * d, self.dtype)
        d_wide_TM, active_TM = room.take(self.up.product.n), room.take(self.up.product.n)
        back_TD, d_attended_TD, d_qkv_TN = room.take(d), room.take(d), room.take(3 * d)
        d_TD, *norm2 = self.norm2.backward(d_TD, k.normed2)
        low_TD = d_TD.to(self.dtype)
        self.down.product.backward(low_TD, none, d_wide_TM, "gelu_backward", k.wide, active_TM)
        down = self.down.gradients(active_TM, none, low_TD, none)
        self.up.product.backward(d_wide_TM, none, back_TD)
        up = self.up.gradients(k.middle, none, d_wide_TM, none)
        d_TD, *norm1 = self.norm1.backward(d_TD + back_TD, k.normed1)
        low_TD = d_TD.to(self.dtype)
        self.o.product.backward(low_TD, none, d_attended_TD)
        o = self.o.gradients(k.attended, none, low_TD, none)
        self.attend.backward(d_attended_TD, k.qkv, k.attended, at, k.seen, d_qkv_TN)
        self.qkv.product.backward(d_qkv_TN, none, back_TD)
        qkv = self.qkv.gradients(k.x, none, d_qkv_TN, none)
        return d_TD + back_TD, [*qkv, *o, *up, *down, *norm1, *norm2]
