"""The decoder stack of Llama-shaped models as one function over its weights, forward and backward by hand, on a CPU.

Frozen weights get no gradient; q, k, v and gate, up are one product each; the backward ends at the lowest trained
layer. It computes what the plain modules compute.
models/fast_serves.py says which models and tuners it does not serve; those run the plain modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunewright.models.fast_serves import WINDOWS, head_dim, tiles_fit
from tunewright.models.fast_weights import Layer, Linear, Norm, Room, norm_parameters
from tunewright.models.layouts import causal_lm, decoder_of
from tunewright.models.policy import head_of
from tunewright.ops.attention import prefixes_of, segment_attention
from tunewright.ops.families import families
from tunewright.ops.kernels import Kernels, double
from tunewright.ops.logprob import TileHead
from tunewright.ops.lora import TileProduct, TorchProduct, padded
from tunewright.ops.types import Batch


@dataclass(frozen=True)
class Shape:
    """heads, kv: query and key/value heads. hd: width of a head. window: 0 or the sliding window. eps: of RMSNorm."""

    heads: int
    kv: int
    hd: int
    window: int
    eps: float

    @property
    def q(self) -> slice:
        return slice(0, self.heads * self.hd)

    @property
    def k(self) -> slice:
        return slice(self.q.stop, self.q.stop + self.kv * self.hd)

    @property
    def v(self) -> slice:
        return slice(self.k.stop, self.k.stop + self.kv * self.hd)


@dataclass(frozen=True)
class Packed:
    """A batch for the kernels: tokens padded to whole blocks (n of them real), where segments start, cosine and sine
    [T, hd/2]. record: the same as a struct of C (layer.h, Pack).

    A segment that others continue is one with them here (ops/families.py); holes: [T, 2] which of its earlier tokens a
    token does not see, or None.
    """

    tokens_T: Tensor
    starts: Tensor
    holes: Tensor | None
    cosine: Tensor
    sine: Tensor
    n: int
    record: Tensor
    segments: list[int]
    prefixes: list[tuple[int, int]] | None

    @property
    def total(self) -> int:
        return self.tokens_T.shape[0]


@dataclass(frozen=True)
class Kept:
    """What the backward of a layer needs of its forward; only x is kept when the layer is computed again.

    What the norms made of x and mid is always made again: writing it to memory and reading it there takes as long.

    small: [2 + heads, T] float32, 1/rms of both norms and the attention's log-sum-exp. graph: attention without tiles.
    low: [T, r] of each product's update, narrow results, in the order of Layer.linears. room: all but x and small where
    the layer is one call of the kernels.
    """

    x: Tensor
    small: Tensor | None = None
    room: Tensor | None = None
    low: tuple[Tensor, ...] = ()
    qkv: Tensor | None = None
    attended: Tensor | None = None
    graph: tuple[Tensor, Tensor] | None = None
    mid: Tensor | None = None
    gu: Tensor | None = None


def runs_on_tiles(model: nn.Module, dtype: torch.dtype, kernels: Kernels) -> bool:
    """Whether the AMX kernels would compute this model."""
    return kernels.tiles and dtype == torch.bfloat16 and tiles_fit(causal_lm(model).config)


class FastLlama:
    """Hidden states of a Llama-shaped model with frozen weights and LoRA: call it with a Batch, get [T, D].

    Built once from the model (why_not() must be None); the trained matrices are read again whenever they changed.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, kernels: Kernels) -> None:
        decoder: Any = decoder_of(model)
        config = decoder.config
        self.kernels, self.dtype = kernels, dtype
        self.tiles = runs_on_tiles(model, dtype, kernels)
        kind = TileProduct if self.tiles else TorchProduct
        window = WINDOWS[config.model_type](decoder)
        hd = head_dim(config)
        self.shape = Shape(
            config.num_attention_heads, config.num_key_value_heads, hd, window or 0, float(config.rms_norm_eps)
        )
        self.embedding: nn.Parameter = decoder.embed_tokens.weight
        self.padding: int | None = decoder.embed_tokens.padding_idx
        self.rotary = decoder.rotary_emb
        self.norm = Norm(decoder.norm)
        self.layers = [Layer(kind, kernels, layer, dtype) for layer in decoder.layers]
        head = head_of(model)
        plain = self.tiles and head.softcap is None and head.bias is None
        self.head = TileHead(kernels, head.weight, head.scale) if plain else None
        self.checkpointing = "none"
        self._seen: tuple[Any, ...] = ()
        linears = [linear for layer in self.layers for linear in layer.linears]
        norms = [n for n in (*(n for layer in self.layers for n in layer.norms), self.norm) if n.trained]
        heads = [self.head] if self.head is not None and self.head.weight.requires_grad else []
        self._low_rank = [linear for linear in linears if linear.low_rank]
        self._whole = [*(linear for linear in linears if linear.whole), *norms, *heads]
        self._trained = [p for linear in linears for p in linear.all_parameters()] + norm_parameters(norms)
        self._trained += [head.weight for head in heads]

    @property
    def shares_prefixes(self) -> bool:
        """Whether a batch may hold segments that continue others. Not on tiles with a window: it counts rows there."""
        return not (self.tiles and self.shape.window)

    def __call__(self, batch: Batch) -> Tensor:
        """[T, D] after the final norm, with gradients to the trained matrices if gradients are on."""
        self._refresh()
        parameters = [p for layer in self.layers for p in layer.parameters()] + norm_parameters([self.norm])
        parameters += [self.embedding] if self.embedding.requires_grad else []
        keep = torch.is_grad_enabled() and bool(parameters)
        with torch.autocast("cpu", enabled=False):  # each product has its dtype; autocast would change torch's
            return _Hidden.apply(self, self._pack(batch), keep, *parameters)

    def _refresh(self) -> None:
        """Take over what an optimizer, a load or a switch changed since the last call."""
        on = tuple(linear.places() for linear in self._low_rank)
        values = tuple(p._version for p in self._trained)
        if (on, values) == self._seen:
            return
        if not self._seen or on != self._seen[0]:
            for linear in self._low_rank:
                linear.product.set_updates(linear.updates())
            for layer in self.layers:
                layer.update_record()
        for linear in self._low_rank:
            linear.product.refresh()
        for part in self._whole:
            part.refresh()
        self._seen = (on, values)

    @property
    def weights(self) -> tuple[Any, ...]:
        """Which values of the trained weights count at present."""
        return self._seen

    def require(self, weights: tuple[Any, ...]) -> None:
        """Have those values that a forward used, after a switch was off and on again in between.

        Raises RuntimeError if the weights themselves have changed since.
        """
        self._refresh()
        if self._seen != weights:
            raise RuntimeError("the trained weights changed between the forward and its backward")

    def _pack(self, batch: Batch) -> Packed:
        n = batch.n_tokens
        total = padded(n)
        tokens = torch.zeros(total, dtype=torch.int64)
        tokens[:n] = batch.tokens_T
        positions = torch.zeros(1, total, dtype=torch.int64)
        positions[0, :n] = batch.position_T
        half = self.shape.hd // 2
        cosine, sine = (t[0, :, :half].float().contiguous() for t in self.rotary(torch.empty(0), positions))
        (starts, holes), s = families(batch), self.shape
        sizes = [total, n, s.heads, s.kv, s.hd, s.window, starts.numel() - 1]
        places = [t.data_ptr() for t in (starts, cosine, sine)]
        record = torch.tensor([*sizes, *places, double(s.eps), 0 if holes is None else holes.data_ptr()])
        return Packed(tokens, starts, holes, cosine, sine, n, record, batch.cu_seqlens.tolist(), prefixes_of(batch))

    # ---- forward

    def forward(self, b: Packed, keep: bool) -> tuple[Tensor, list[Kept], Tensor, Tensor]:
        """(hidden [T, D], what each layer keeps, the last layer's output, 1/rms of it)."""
        x = self.embedding[b.tokens_T].to(self.dtype)
        x[b.n :] = 0
        own = self._own_room(b)
        lowest = self.lowest() if keep else len(self.layers)
        kept: list[Kept] = []
        for i, layer in enumerate(self.layers):
            x, k = self._layer(layer, x, b, own)
            if i >= lowest:
                again = {"none": False, "selective": i % 2 == 1, "full": True}[self.checkpointing]
                kept.append(Kept(k.x) if again else k)
        rstd = torch.empty(b.total)
        return self._rmsnorm(x, self.norm.weight, torch.empty_like(x), rstd), kept, x, rstd

    def lowest(self) -> int:
        """The lowest layer whose backward must run."""
        if self.embedding.requires_grad:
            return 0
        return min((i for i, layer in enumerate(self.layers) if layer.trained), default=len(self.layers))

    def _own_room(self, b: Packed) -> Room:
        """Memory for one layer's inputs of its products, used again by the next layer."""
        return Room(b.total, max(_inputs(layer) for layer in self.layers), self.dtype)

    def _layer(self, w: Layer, x: Tensor, b: Packed, own: Room) -> tuple[Tensor, Kept]:
        """(the layer's output, all that its backward needs)."""
        if w.one_call:
            return self._layer_at_once(w, x, b, own)
        own.at = 0
        d, gu_out = x.shape[1], w.gate_up.product.n
        low = narrow_rooms(w, b.total, self.dtype)
        room = Room(b.total, self.shape.v.stop + w.o.product.k + d + gu_out, self.dtype)
        small = torch.empty(2 + self.shape.heads, b.total)
        xn = self._rmsnorm(x, w.norm1.weight, own.take(d), small[0])
        qkv = room.take(self.shape.v.stop)
        w.qkv.product.forward(xn, low[0], qkv)
        if w.qkv.bias is not None:
            qkv += w.qkv.bias
        self._rope(qkv, b, 1.0)
        attended = room.take(w.o.product.k)
        graph = self._attention(qkv, attended, small[2:], b)
        mid = room.take(d)
        w.o.product.forward(attended, low[1], mid, "add", x)
        xn2 = self._rmsnorm(mid, w.norm2.weight, own.take(d), small[1])
        gu, h = room.take(gu_out), own.take(w.down.product.k)
        w.gate_up.product.forward(xn2, low[2], gu, "swiglu", h)
        out = torch.empty(b.total, d, dtype=self.dtype)
        w.down.product.forward(h, low[3], out, "add", mid)
        return out, Kept(x, small, None, low, qkv, attended, graph, mid, gu)

    def _layer_at_once(self, w: Layer, x: Tensor, b: Packed, own: Room) -> tuple[Tensor, Kept]:
        """_layer of tiles with nothing but low-rank updates."""
        room = torch.empty(b.total * w.kept_columns, dtype=self.dtype)
        small, out = torch.empty(2 + self.shape.heads, b.total), torch.empty_like(x)
        self.kernels("layer_forward_tiles", b.record, w.record, x, out, room, small, own.flat)
        return out, Kept(x, small, room)

    def _rmsnorm(self, x: Tensor, weight: Tensor, to: Tensor, rstd: Tensor) -> Tensor:
        sizes = (rstd, x.shape[0], x.shape[1])
        self.kernels.rows("rmsnorm", self.dtype, x, x.stride(0), weight, self.shape.eps, to, to.stride(0), *sizes)
        return to

    def _rope(self, qkv: Tensor, b: Packed, sign: float) -> None:
        s = self.shape
        self.kernels.rows("rope", self.dtype, qkv, qkv.stride(0), b.cosine, b.sine, sign, b.total, s.heads + s.kv, s.hd)

    def _attention(self, qkv: Tensor, out: Tensor, lse: Tensor, b: Packed) -> tuple[Tensor, Tensor] | None:
        """Fill `out`, and lse [heads, T] on tiles; without tiles returns torch's graph (leaf, output)."""
        s = self.shape
        width = s.heads * s.hd
        out[b.n :] = 0
        if not self.tiles:
            with torch.enable_grad():
                leaf = qkv[: b.n].detach().clone().requires_grad_()
                q, k, v = (leaf[:, c].view(1, b.n, -1, s.hd).transpose(1, 2) for c in (s.q, s.k, s.v))
                seen = {"window": s.window or None, "prefixes": b.prefixes}
                o = segment_attention(q, k, v, b.segments, **seen)[0].transpose(0, 1)
            out[: b.n] = o.detach().reshape(b.n, width)
            return leaf, o
        self.kernels("attention_tiles", *self._attention_sizes(qkv, out, lse, b))
        return None

    def _attention_sizes(self, qkv: Tensor, out: Tensor, lse: Tensor, b: Packed) -> tuple[Any, ...]:
        s = self.shape
        parts = (qkv, qkv[:, s.k], qkv[:, s.v], qkv.stride(0), b.starts, b.starts.numel() - 1)
        return (*parts, s.heads, s.kv, s.hd, s.hd**-0.5, s.window, out, out.stride(0), lse, b.total, b.holes)

    # ---- backward

    def backward(self, b: Packed, kept: list[Kept], last: Tensor, rstd: Tensor, grad: Tensor) -> list[Tensor]:
        """Gradients of what __call__ passes to autograd, in its order. `kept` is emptied on the way."""
        lowest = len(self.layers) - len(kept)
        found: list[list[Tensor]] = []
        turns = [torch.empty_like(last) for _ in range(2)]
        own = self._own_room(b)
        scratch = Room(b.total, max(_scratch(layer) for layer in self.layers), self.dtype)
        dx = turns[0]
        g_norm = self._rmsnorm_backward(grad, last, self.norm, rstd, None, dx)
        for i in range(len(self.layers) - 1, lowest - 1, -1):
            layer, k = self.layers[i], kept.pop()
            if k.small is None:
                _, k = self._layer(layer, k.x, b, own)
            turns.reverse()
            to = turns[0] if i > lowest or self.embedding.requires_grad or layer.norm1.trained else None
            scratch.at = own.at = 0
            found.append(self._layer_backward(layer, k, b, dx, to, own, scratch))
            if to is not None:
                dx = to
        g_embedding = [self._embedding_gradient(b, dx[: b.n])] if self.embedding.requires_grad else []
        return [*(g for grads in reversed(found) for g in grads), *g_norm, *g_embedding]

    def _embedding_gradient(self, b: Packed, dx_TD: Tensor) -> Tensor:
        grad_VD = torch.zeros(self.embedding.shape).index_add_(0, b.tokens_T[: b.n], dx_TD.float())
        if self.padding is not None:  # as nn.Embedding: the padding token's row is not trained from its inputs
            grad_VD[self.padding] = 0
        return grad_VD

    def _layer_backward(
        self, w: Layer, k: Kept, b: Packed, dx: Tensor, to: Tensor | None, own: Room, scratch: Room
    ) -> list[Tensor]:
        """dx: gradient of the layer's output. to: where its input's goes, or None."""
        if k.room is not None:
            found = torch.empty(sum(w.gradient_sizes))
            places = (k.x, k.room, k.small, dx, to, own.flat, scratch.flat, found)
            self.kernels("layer_backward_tiles", b.record, w.record, *places)
            return w.split_gradients(found)
        assert k.small is not None and k.mid is not None and k.attended is not None and k.gu is not None
        rstd1, rstd2, lse = k.small[0], k.small[1], k.small[2:]
        low = narrow_rooms(w, b.total, self.dtype)
        dgu, h = scratch.take(w.gate_up.product.n), own.take(w.down.product.k)
        w.down.product.backward(dx, low[3], dgu, "swiglu_backward", k.gu, h)
        g_down = w.down.gradients(h if w.down.trained else None, k.low[3], dx, low[3])
        dn = scratch.take(k.x.shape[1])
        w.gate_up.product.backward(dgu, low[2], dn)
        xn2 = self._normed_again(k.mid, w.norm2, rstd2, w.gate_up, own)
        g_gate_up = w.gate_up.gradients(xn2, k.low[2], dgu, low[2])
        dmid = scratch.take(k.x.shape[1])
        g_norm2 = self._rmsnorm_backward(dn, k.mid, w.norm2, rstd2, dx, dmid)
        dout = scratch.take(w.o.product.k)
        w.o.product.backward(dmid, low[1], dout)
        g_o = w.o.gradients(k.attended, k.low[1], dmid, low[1])
        dqkv = scratch.take(w.qkv.product.n)
        self._attention_backward(k, lse, dout, dqkv, b)
        self._rope(dqkv, b, -1.0)
        g_norm1: list[Tensor] = []
        if to is None:
            w.qkv.product.backward(dqkv, low[0], None)
        else:
            w.qkv.product.backward(dqkv, low[0], dn)
            g_norm1 = self._rmsnorm_backward(dn, k.x, w.norm1, rstd1, dmid, to)
        g_qkv = w.qkv.gradients(self._normed_again(k.x, w.norm1, rstd1, w.qkv, own), k.low[0], dqkv, low[0])
        return [*g_qkv, *g_o, *g_gate_up, *g_down, *g_norm1, *g_norm2]

    def _normed_again(self, x: Tensor, norm: Norm, rstd: Tensor, linear: Linear, own: Room) -> Tensor | None:
        """The input of `linear` as the forward had it, where a gradient needs it."""
        return self._rmsnorm(x, norm.weight, own.take(x.shape[1]), rstd) if linear.trained else None

    def _rmsnorm_backward(
        self, dy: Tensor, x: Tensor, norm: Norm, rstd: Tensor, residual: Tensor | None, to: Tensor
    ) -> list[Tensor]:
        """Fill `to`; returns the gradient of the norm's weight if it is trained."""
        ld = 0 if residual is None else residual.stride(0)
        dw = torch.zeros(self.kernels.threads, x.shape[1]) if norm.trained else None
        first = (dy, dy.stride(0), x, x.stride(0), norm.weight, rstd, residual, ld, to, to.stride(0))
        self.kernels.rows("rmsnorm_backward", self.dtype, *first, dw, x.shape[0], x.shape[1])
        return [] if dw is None else [dw.sum(0)]

    def _attention_backward(self, k: Kept, lse: Tensor, dout: Tensor, dqkv: Tensor, b: Packed) -> None:
        s = self.shape
        dqkv[b.n :] = 0
        if not self.tiles:
            assert k.graph is not None
            leaf, out = k.graph
            (found,) = torch.autograd.grad(out, leaf, dout[: b.n].view(b.n, s.heads, s.hd))
            dqkv[: b.n] = found
            return
        sizes = self._attention_sizes(k.qkv, k.attended, lse, b)  # type: ignore[arg-type]
        to = (dqkv, dqkv[:, s.k], dqkv[:, s.v], dqkv.stride(0))
        self.kernels("attention_backward_tiles", *sizes, dout, dout.stride(0), *to)


def narrow_rooms(w: Layer, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Memory for the narrow results of a layer's products, [rows, r] each."""
    ranks = [linear.product.r for linear in w.linears]
    parts = torch.empty(rows * sum(ranks), dtype=dtype).split([rows * r for r in ranks])
    return tuple(part.view(rows, r) for part, r in zip(parts, ranks, strict=True))


def _inputs(w: Layer) -> int:
    """Columns of the inputs of one layer's products that its backward makes again."""
    return w.qkv.product.k + w.gate_up.product.k + w.down.product.k


def _scratch(w: Layer) -> int:
    """Columns that one layer's backward takes of its scratch memory."""
    narrow = sum(linear.product.r for linear in w.linears)
    return w.gate_up.product.n + 2 * w.gate_up.product.k + w.o.product.k + w.qkv.product.n + narrow


class _Hidden(torch.autograd.Function):
    """The whole stack as one node of autograd."""

    @staticmethod
    def forward(ctx: Any, fast: FastLlama, b: Packed, keep: bool, *parameters: Tensor) -> Tensor:
        out, kept, last, rstd = fast.forward(b, keep)
        ctx.fast, ctx.b, ctx.kept, ctx.last, ctx.rstd, ctx.out = fast, b, kept, last, rstd, out.shape
        ctx.weights = fast.weights
        if not keep:
            ctx.mark_non_differentiable(out)
        return out[: b.n]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.fast.require(ctx.weights)
        if ctx.kept is None:
            raise RuntimeError("the fast path keeps its forward for one backward only")
        whole = grad.new_zeros(ctx.out)
        whole[: ctx.b.n] = grad
        grads = ctx.fast.backward(ctx.b, ctx.kept, ctx.last, ctx.rstd, whole)
        ctx.kept = None
        return (None, None, None, *grads)
