"""BERT's layers (MiniLM, bert-base …) as one function over packed rows, when all of its weights are trained on a CPU.

The same numbers as the modules under autocast, with a third of the operations: weights are brought down to the dtype of
the products once a step, query, key and value are one product, and the gradient of the word embeddings is added to one
matrix that stays, of which only the rows of the last step are cleared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunewright.models.layouts import PACKED, causal_lm, layout_of
from tunewright.ops.logprob import TileHead
from tunewright.ops.padding import buckets, places, real
from tunewright.ops.types import Batch

WASTE = 0.3  # of the attention's padded sets


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

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        body: Any = getattr(model, "bert")  # noqa: B009
        self.checkpointing = "none"
        self.head: TileHead | None = None
        self.heads: int = body.config.num_attention_heads
        self.embeddings = Embeddings(body.embeddings)
        self.layers = [Layer(layer, self.heads, dtype) for layer in body.encoder.layer]
        self.parameters = [*self.embeddings.parameters, *(p for layer in self.layers for p in layer.parameters)]

    def __call__(self, batch: Batch) -> Tensor:
        """[T, D] float32: the last layer's output."""
        with torch.autocast("cpu", enabled=False):
            for layer in self.layers:
                layer.refresh()
            if torch.is_grad_enabled():
                return _Encoder.apply(self, batch, *self.parameters)  # type: ignore[no-any-return]
            sets = sets_of(batch.cu_seqlens.diff().tolist(), self.heads)
            x_TD = self.embeddings.forward(batch)[0]
            for layer in self.layers:
                x_TD = layer.forward(x_TD, sets)[0]
            return x_TD

    def kept(self, i: int) -> bool:
        """Whether what layer i computes is kept for the backward, or computed again."""
        return self.checkpointing == "none" or (self.checkpointing == "selective" and i % 2 == 0)


class _Encoder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fast: FastBert, batch: Batch, *_: Tensor) -> Tensor:
        ctx.fast, ctx.batch = fast, batch
        ctx.sets = sets_of(batch.cu_seqlens.diff().tolist(), fast.heads)
        x_TD, ctx.norm = fast.embeddings.forward(batch)
        ctx.saved = []
        for i, layer in enumerate(fast.layers):
            out_TD, kept = layer.forward(x_TD, ctx.sets)
            ctx.saved.append(kept if fast.kept(i) else x_TD)
            x_TD = out_TD
        return x_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_TD: Tensor) -> Any:  # type: ignore[override]
        fast: FastBert = ctx.fast
        found: list[Tensor | None] = []
        for layer in reversed(fast.layers):
            kept = ctx.saved.pop()
            if isinstance(kept, Tensor):
                kept = layer.forward(kept, ctx.sets)[1]
            d_TD, gradients = layer.backward(d_TD, kept, ctx.sets)
            found[:0] = gradients
        return None, None, *fast.embeddings.backward(d_TD, ctx.batch, ctx.norm), *found


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


class Product:
    """One or more linear layers over the same input, their weights [N, K] in the dtype of the products."""

    def __init__(self, modules: Sequence[Any], dtype: torch.dtype) -> None:
        self.modules = modules
        self.sizes = [m.weight.shape[0] for m in modules]
        self.parameters = [p for m in modules for p in (m.weight, m.bias)]
        self.weight = torch.empty(sum(self.sizes), modules[0].weight.shape[1], dtype=dtype)
        self.bias = torch.empty(sum(self.sizes), dtype=dtype)
        self.version: list[int] = []

    def refresh(self) -> None:
        """Take over the present weights."""
        version = [p._version for p in self.parameters]
        if version != self.version:
            with torch.no_grad():
                for module, w, b in zip(
                    self.modules, self.weight.split(self.sizes), self.bias.split(self.sizes), strict=True
                ):
                    w.copy_(module.weight)
                    b.copy_(module.bias)
            self.version = version

    def forward(self, x_TK: Tensor) -> Tensor:
        return torch.addmm(self.bias, x_TK, self.weight.t())

    def backward(self, d_TN: Tensor, x_TK: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(gradient of the input, gradients of the parameters)."""
        weights = (d_TN.t() @ x_TK).float().split(self.sizes)
        biases = d_TN.sum(0).float().split(self.sizes)
        whole = len(self.sizes) == 1  # parts of one tensor would keep it whole: each gets its own memory
        own: Callable[[Tensor], Tensor] = (lambda g: g) if whole else Tensor.clone
        return d_TN @ self.weight, [own(g) for pair in zip(weights, biases, strict=True) for g in pair]


@dataclass(frozen=True)
class Set:
    """Segments of similar length, as S rows of L in the attention.

    split: [3 * S * H * L] places in qkv as [T * 3 * H, K] of query, key and value of each row, head and token.
    join: [T' * H] places in the output as [S * H * L, K] of its T' tokens' heads. at: [T'] these tokens in the pack.
    unsplit: [T' * 3 * H] places in the gradients of query, key and value as [3 * S * H * L, K].
    spread: [S * H * L] places in [T * H, K]. real: [S * H * L, 1] 1 where there is a token, else 0.
    bias: [S * H, 1, L] -inf where there is no key.
    """

    rows: int
    length: int
    split: Tensor
    join: Tensor
    at: Tensor
    unsplit: Tensor
    spread: Tensor
    real: Tensor
    bias: Tensor


def sets_of(lengths: Sequence[int], heads: int) -> list[Set]:
    """The segments of a pack in sets."""
    ends = [0, *accumulate(lengths)]
    return [
        _set([lengths[i] for i in rows], [ends[i] for i in rows], heads)
        for rows in buckets([(n,) for n in lengths], WASTE)
    ]


def _set(own: list[int], starts: list[int], heads: int) -> Set:
    s, n, h = len(own), max(own), torch.arange(heads)
    row_T, column_T = places(own, torch.device("cpu"))
    at_T = torch.tensor(starts)[row_T] + column_T
    there_SL = real(own, torch.device("cpu"))
    token_SL = torch.zeros_like(there_SL).index_put((row_T, column_T), at_T)
    part = torch.arange(3)
    split = token_SL[None, :, None, :] * (3 * heads) + part[:, None, None, None] * heads + h[None, None, :, None]
    place_TH = (row_T[:, None] * heads + h) * n + column_T[:, None]
    unsplit = part[None, :, None] * (s * heads * n) + place_TH[:, None]
    there = there_SL[:, None].expand(s, heads, n)
    return Set(
        rows=s,
        length=n,
        split=split.flatten(),
        join=place_TH.flatten(),
        at=at_T,
        unsplit=unsplit.flatten(),
        spread=(token_SL[:, None] * heads + h[:, None]).flatten(),
        real=there.reshape(-1, 1),
        bias=torch.zeros(s * heads, 1, n).masked_fill_(there.reshape(s * heads, 1, n) == 0, -torch.inf),
    )


def attend(qkv_TN: Tensor, heads: int, sets: Sequence[Set]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """[T, D], and for each set (query, key and value [3, S * H, L, K], the shares [S * H, L, L]) for the backward."""
    t, k = qkv_TN.shape[0], qkv_TN.shape[1] // (3 * heads)
    out_TD = qkv_TN.new_empty(t, heads * k)
    saved = []
    for s in sets:
        qkv = qkv_TN.view(-1, k).index_select(0, s.split).view(3, s.rows * heads, s.length, k)
        scores = torch.baddbmm(s.bias.to(qkv.dtype), qkv[0], qkv[1].transpose(1, 2), alpha=k**-0.5)
        shares = scores.softmax(-1, dtype=torch.float32).to(qkv.dtype)
        out = torch.bmm(shares, qkv[2]).view(-1, k).index_select(0, s.join)
        out_TD.index_copy_(0, s.at, out.view(-1, heads * k))
        saved.append((qkv, shares))
    return out_TD, saved


def attend_backward(d_TD: Tensor, heads: int, sets: Sequence[Set], saved: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """[T, 3 * D]: the gradient of query, key and value."""
    k = d_TD.shape[1] // heads
    out_TN = d_TD.new_empty(d_TD.shape[0], 3 * d_TD.shape[1])
    for s, (qkv, shares) in zip(sets, saved, strict=True):
        d = d_TD.view(-1, k).index_select(0, s.spread).mul_(s.real).view(-1, s.length, k)
        found = torch.empty_like(qkv)
        d_shares = torch.bmm(d, qkv[2].transpose(1, 2))
        d_scores = torch.ops.aten._softmax_backward_data(d_shares, shares, -1, d.dtype).mul_(k**-0.5)
        torch.bmm(d_scores, qkv[1], out=found[0])
        torch.bmm(d_scores.transpose(1, 2), qkv[0], out=found[1])
        torch.bmm(shares.transpose(1, 2), d, out=found[2])
        out_TN.index_copy_(0, s.at, found.view(-1, k).index_select(0, s.unsplit).view(len(s.at), -1))
    return out_TN


class Layer:
    """Attention and MLP of one layer, each with a residual and a norm after it."""

    def __init__(self, module: Any, heads: int, dtype: torch.dtype) -> None:
        attention = module.attention
        self.heads, self.dtype = heads, dtype
        own = attention.self
        self.qkv = Product([own.query, own.key, own.value], dtype)
        self.o = Product([attention.output.dense], dtype)
        self.up = Product([module.intermediate.dense], dtype)
        self.down = Product([module.output.dense], dtype)
        self.norm1, self.norm2 = Norm(attention.output.LayerNorm), Norm(module.output.LayerNorm)
        parts = (self.qkv, self.o, self.norm1, self.up, self.down, self.norm2)
        self.parameters = [p for part in parts for p in part.parameters]

    def refresh(self) -> None:
        for product in (self.qkv, self.o, self.up, self.down):
            product.refresh()

    def forward(self, x_TD: Tensor, sets: Sequence[Set]) -> tuple[Tensor, tuple[Any, ...]]:
        """[T, D] float32, and what backward() needs."""
        low_TD = x_TD.to(self.dtype)
        mixed_TD, attention = attend(self.qkv.forward(low_TD), self.heads, sets)
        middle_TD, normed1 = self.norm1.forward(x_TD + self.o.forward(mixed_TD))
        low_middle_TD = middle_TD.to(self.dtype)
        wide_TM = self.up.forward(low_middle_TD)
        active_TM = F.gelu(wide_TM)
        out_TD, normed2 = self.norm2.forward(middle_TD + self.down.forward(active_TM))
        return out_TD, (low_TD, attention, mixed_TD, normed1, low_middle_TD, wide_TM, active_TM, normed2)

    def backward(self, d_TD: Tensor, kept: tuple[Any, ...], sets: Sequence[Set]) -> tuple[Tensor, list[Tensor]]:
        """(gradient of the input, gradients of the parameters)."""
        low_TD, attention, mixed_TD, normed1, low_middle_TD, wide_TM, active_TM, normed2 = kept
        d_TD, *norm2 = self.norm2.backward(d_TD, normed2)
        d_TM, down = self.down.backward(d_TD.to(self.dtype), active_TM)
        d_low_TD, up = self.up.backward(torch.ops.aten.gelu_backward(d_TM, wide_TM), low_middle_TD)
        d_TD, *norm1 = self.norm1.backward(d_TD + d_low_TD, normed1)
        d_low_TD, o = self.o.backward(d_TD.to(self.dtype), mixed_TD)
        d_low_TD, qkv = self.qkv.backward(attend_backward(d_low_TD, self.heads, sets, attention), low_TD)
        return d_TD + d_low_TD, [*qkv, *o, *norm1, *up, *down, *norm2]
