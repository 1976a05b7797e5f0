"""The decoder stack of Llama-shaped models as one function over its weights, forward and backward by hand, on a CPU.

Frozen weights get no gradient; q, k, v and gate, up are one product each; the backward ends at the lowest trained
layer. It computes what the plain modules compute.
models/fast_serves.py says which models and tuners it does not serve; those run the plain modules.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunewright.models.fast_attention import Attend, Heads, Segments, Served, TileAttention, TorchAttention
from tunewright.models.fast_bottleneck import add, behind, beside
from tunewright.models.fast_kept import Kept, Packed, Prefix, if_given, spread_rows, take_rows
from tunewright.models.fast_serves import WINDOWS, head_dim, tiles_fit
from tunewright.models.fast_weights import Layer, Norm, Room, Values, norm_parameters
from tunewright.models.layouts import causal_lm, decoder_of, virtual_of
from tunewright.models.policy import head_of
from tunewright.ops.attention import prefixes_of
from tunewright.ops.families import families
from tunewright.ops.kernels import Kernels, double
from tunewright.ops.logprob import TileHead
from tunewright.ops.lora import TileProduct, TorchProduct, padded
from tunewright.ops.types import Batch
from tunewright.ops.virtual import insert_rows, others, side_by_side


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
        self.model, self.kernels, self.dtype = model, kernels, dtype
        self.tiles = runs_on_tiles(model, dtype, kernels)
        kind = TileProduct if self.tiles else TorchProduct
        window = WINDOWS[config.model_type](decoder)
        self.shape = Heads(config.num_attention_heads, config.num_key_value_heads, head_dim(config), window or 0)
        self.attend: Any = TileAttention(kernels, self.shape) if self.tiles else TorchAttention(self.shape)
        self.eps = float(config.rms_norm_eps)
        self.embedding: nn.Parameter = decoder.embed_tokens.weight
        self.padding: int | None = decoder.embed_tokens.padding_idx
        self.rotary = decoder.rotary_emb
        self.norm = Norm(decoder.norm)
        self.layers = [Layer(kind, kernels, layer, dtype) for layer in decoder.layers]
        self.head = self._tile_head() if self.tiles else None
        self.checkpointing = "none"
        self.values = Values(self.layers, self.norm, self.head)

    def _tile_head(self) -> TileHead | None:
        """The LM head for the kernels, if there is one and they serve it."""
        lm: Any = causal_lm(self.model)
        head = None if lm.get_output_embeddings() is None else head_of(self.model)
        if head is None or head.softcap is not None or head.bias is not None:
            return None
        return TileHead(self.kernels, head.weight, head.scale)

    @property
    def shares_prefixes(self) -> bool:
        """Whether a batch may hold segments that continue others. Not on tiles with a window: it counts rows there."""
        return not (self.tiles and self.shape.window)

    def __call__(self, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """[T, D] after the final norm, with gradients to the trained matrices if gradients are on. rows: [N, D] of
        these tokens only, which spares the last layer work."""
        self.values.refresh()
        virtual, inputs, before, at_V = virtual_of(self.model), None, None, None
        if virtual is not None:
            embedded_TD = F.embedding(batch.tokens_T, self.embedding)
            rows_ND = embedded_TD.new_zeros(virtual.n, embedded_TD.shape[1])
            if virtual.rows_ND is not None:
                rows_ND = virtual.rows_ND
            batch, inputs, at_T = insert_rows(batch, rows_ND, embedded_TD)
            rows = at_T if rows is None else at_T[rows]
            before, at_V = side_by_side(virtual), others(at_T, batch.n_tokens)
        parameters = [p for layer in self.layers for p in layer.parameters()] + norm_parameters([self.norm])
        parameters += [self.embedding] if inputs is None and self.embedding.requires_grad else []
        pack = self._pack(batch, inputs)
        if before is not None and at_V is not None:
            pack = replace(pack, prefix=Prefix(at_V, before.detach()))
        trained = before is not None and before.requires_grad
        keep = torch.is_grad_enabled() and (pack.below or trained or bool(parameters))
        with torch.autocast("cpu", enabled=False):  # each product has its dtype; autocast would change torch's
            if rows is not None and not 0 < padded(rows.numel()) < padded(batch.n_tokens):
                return _Hidden.apply(self, pack, None, keep, inputs, before, *parameters)[rows]
            return _Hidden.apply(self, pack, rows, keep, inputs, before, *parameters)

    @torch.no_grad()
    def serve(self, tokens_T: Tensor, positions_T: Tensor, rows_N: Tensor, attend: Attend) -> Tensor:
        """[N, D] after the final norm of the tokens rows_N of a serving step, whose attention is the engine's."""
        with torch.inference_mode(False):  # what it makes of the weights is written again in training
            self.values.refresh()
        n = tokens_T.numel()
        pack = self._packed(tokens_T, positions_T, Segments(n, torch.tensor([0, n]), None, [0, n], None), None)
        rows = rows_N if rows_N.numel() < n else None
        with torch.autocast("cpu", enabled=False):
            return self.forward(pack, rows, False, attend)[0][: rows_N.numel()]

    def _pack(self, batch: Batch, inputs: Tensor | None) -> Packed:
        starts, holes = families(batch)
        at = Segments(batch.n_tokens, starts, holes, batch.cu_seqlens.tolist(), prefixes_of(batch))
        return self._packed(batch.tokens_T, batch.position_T, at, inputs)

    def _packed(self, tokens_T: Tensor, positions_T: Tensor, at: Segments, inputs: Tensor | None) -> Packed:
        total, s = padded(at.n), self.shape
        tokens = torch.zeros(total, dtype=torch.int64)
        tokens[: at.n] = tokens_T
        positions = torch.zeros(1, total, dtype=torch.int64)
        positions[0, : at.n] = positions_T
        cosine, sine = (t[0, :, : s.hd // 2].float().contiguous() for t in self.rotary(torch.empty(0), positions))
        sizes = [total, at.n, s.heads, s.kv, s.hd, s.window, at.starts.numel() - 1]
        places = [t.data_ptr() for t in (at.starts, cosine, sine)]
        record = torch.tensor([*sizes, *places, double(self.eps), 0 if at.holes is None else at.holes.data_ptr()])
        below = (self.embedding if inputs is None else inputs).requires_grad
        return Packed(tokens, None if inputs is None else inputs.detach(), below, at, cosine, sine, record)

    # ---- forward

    def forward(
        self, b: Packed, rows: Tensor | None, keep: bool, attend: Attend | None = None
    ) -> tuple[Tensor, list[Kept], Tensor, Tensor]:
        """(hidden [T, D] or of `rows`, padded; what each layer keeps, the last layer's output, 1/rms of it).

        attend: in the place of our attention."""
        x = (self.embedding[b.tokens_T[: b.n]] if b.inputs is None else b.inputs).to(self.dtype)
        x = F.pad(x, (0, 0, 0, b.total - b.n))
        own = self._own_room(b)
        lowest = len(self.layers) if not keep else 0 if b.below or b.prefix else self.lowest()
        kept: list[Kept] = []
        for i, layer in enumerate(self.layers):
            wanted = rows if i == len(self.layers) - 1 else None
            served = None if attend is None else Served(self.shape, i, attend)
            x, k = self._layer(i, layer, x, b, own, wanted, served)
            if i >= lowest:
                again = {"none": False, "selective": i % 2 == 1, "full": True}[self.checkpointing]
                kept.append(Kept(k.x, rows=wanted) if again else k)
        rstd = torch.empty(x.shape[0])
        return self._rmsnorm(x, self.norm.weight, torch.empty_like(x), rstd), kept, x, rstd

    def lowest(self) -> int:
        """The lowest layer that has something trained."""
        return min((i for i, layer in enumerate(self.layers) if layer.trained), default=len(self.layers))

    def _own_room(self, b: Packed) -> Room:
        """Memory for one layer's inputs of its products, used again by the next layer."""
        return Room(b.total, max(layer.input_columns for layer in self.layers), self.dtype)

    def _layer(
        self, i: int, w: Layer, x: Tensor, b: Packed, own: Room, rows: Tensor | None, attend: Served | None = None
    ) -> tuple[Tensor, Kept]:
        """(the layer's output, of `rows` if these alone are wanted, and all that its backward needs). attend: an
        attention in the place of ours."""
        if w.one_call and rows is None and attend is None and b.prefix is None:
            return self._layer_at_once(w, x, b, own)
        own.at = 0
        d, n = x.shape[1], b.total if rows is None else padded(rows.numel())
        before = w.qkv.product.r + w.qkv.product.n + w.o.product.k  # columns up to the attention, of all tokens
        room, later = Room(b.total, before, self.dtype), Room(n, w.kept_columns - before, self.dtype)
        low = (room.take(w.qkv.product.r), *(later.take(p.product.r) for p in (w.o, w.gate_up, w.down)))
        small = torch.empty(2 + self.shape.heads, b.total)
        xn = self._rmsnorm(x, w.norm1.weight, own.take(d), small[0])
        qkv = room.take(w.qkv.product.n)
        w.qkv.product.forward(xn, low[0], qkv)
        w.qkv.add_bias(qkv)
        self._rope(qkv, b, 1.0)
        if b.prefix is not None:
            b.prefix.put(i, qkv)
        attended = room.take(w.o.product.k)
        seen = (attend or self.attend).forward(qkv, attended, b.at, small[2:])
        chosen = (x, attended) if rows is None else (take_rows(x, rows), take_rows(attended, rows))
        mid, gu, h = later.take(d), later.take(w.gate_up.product.n), own.take(w.down.product.k)[:n]
        alone = [later.take(d) if wanted else None for wanted in w.alone]
        narrow = [None if b is None else later.take(b.size) for b in (w.after_o, w.beside, w.after_down)]
        w.o.product.forward(chosen[1], low[1], mid, "add", chosen[0], *if_given(alone[0]))
        w.o.add_bias(mid, None if w.after_o is None else alone[0])
        add(w.after_o, alone[0], mid, narrow[0])
        xn2 = self._rmsnorm(mid, w.norm2.weight, own.take(d)[:n], small[1, :n])
        w.gate_up.product.forward(xn2, low[2], gu, "swiglu", h, *if_given(w.gate_up.bias))
        out = torch.empty(n, d, dtype=self.dtype)
        w.down.product.forward(h, low[3], out, "add", mid, *if_given(alone[1]))
        w.down.add_bias(out, None if w.after_down is None else alone[1])
        add(w.beside, xn2, out, narrow[1])
        add(w.after_down, alone[1], out, narrow[2])
        return out, Kept(x, small, None, low, qkv, attended, seen, mid, gu, alone, narrow, rows, chosen)

    def _layer_at_once(self, w: Layer, x: Tensor, b: Packed, own: Room) -> tuple[Tensor, Kept]:
        """_layer of tiles with nothing but low-rank updates."""
        room = torch.empty(b.total * w.kept_columns, dtype=self.dtype)
        small, out = torch.empty(2 + self.shape.heads, b.total), torch.empty_like(x)
        self.kernels("layer_forward_tiles", b.record, w.record, x, out, room, small, own.flat)
        return out, Kept(x, small, room)

    def _rmsnorm(self, x: Tensor, weight: Tensor, to: Tensor, rstd: Tensor) -> Tensor:
        sizes = (rstd, x.shape[0], x.shape[1])
        self.kernels.rows("rmsnorm", self.dtype, x, x.stride(0), weight, self.eps, to, to.stride(0), *sizes)
        return to

    def _rope(self, qkv: Tensor, b: Packed, sign: float) -> None:
        s = self.shape
        self.kernels.rows("rope", self.dtype, qkv, qkv.stride(0), b.cosine, b.sine, sign, b.total, s.heads + s.kv, s.hd)

    # ---- backward

    def backward(self, b: Packed, kept: list[Kept], last: Tensor, rstd: Tensor, grad: Tensor) -> list[Tensor | None]:
        """Gradients of what __call__ passes to autograd, in its order. `kept` is emptied on the way."""
        lowest = len(self.layers) - len(kept)
        found: list[list[Tensor]] = []
        g_before: list[Tensor] = []
        turns = [torch.empty(b.total, last.shape[1], dtype=last.dtype) for _ in range(2)]
        own = self._own_room(b)
        scratch = Room(b.total, max(layer.scratch_columns for layer in self.layers), self.dtype)
        dx = turns[0][: last.shape[0]]
        g_norm = self._rmsnorm_backward(grad, last, self.norm, rstd, None, dx)
        for i in range(len(self.layers) - 1, lowest - 1, -1):
            layer, k = self.layers[i], kept.pop()
            if k.small is None:
                _, k = self._layer(i, layer, k.x, b, own, k.rows)
            turns.reverse()
            to = turns[0] if i > lowest or b.below or layer.norm1.trained else None
            scratch.at = own.at = 0
            found.append(self._layer_backward(layer, k, b, dx, to, own, scratch, g_before))
            if to is not None:
                dx = to
        found.reverse()
        before = torch.stack(g_before[::-1]) if g_before else None
        if b.inputs is not None:
            g_inputs = dx[: b.n].to(b.inputs.dtype) if b.below else None
            return [g_inputs, before, *(g for grads in found for g in grads), *g_norm]
        g_embedding = [self._embedding_gradient(b, dx[: b.n])] if b.below else []
        return [None, before, *(g for grads in found for g in grads), *g_norm, *g_embedding]

    def _embedding_gradient(self, b: Packed, dx_TD: Tensor) -> Tensor:
        grad_VD = torch.zeros(self.embedding.shape).index_add_(0, b.tokens_T[: b.n], dx_TD.float())
        if self.padding is not None:  # as nn.Embedding: the padding token's row is not trained from its inputs
            grad_VD[self.padding] = 0
        return grad_VD

    def _layer_backward(
        self,
        w: Layer,
        k: Kept,
        b: Packed,
        dx: Tensor,
        to: Tensor | None,
        own: Room,
        scratch: Room,
        g_before: list[Tensor],
    ) -> list[Tensor]:
        """dx: gradient of the layer's output. to: where its input's goes, or None. g_before: gets that of a prefix."""
        if k.room is not None:
            found = torch.empty(sum(w.gradient_sizes))
            places = (k.x, k.room, k.small, dx, to, own.flat, scratch.flat, found)
            self.kernels("layer_backward_tiles", b.record, w.record, *places)
            return w.split_gradients(found)
        assert k.small is not None and k.mid is not None and k.attended is not None and k.gu is not None
        assert k.chosen is not None
        n, d = k.mid.shape
        rstd1, rstd2 = k.small[0], k.small[1, :n]
        low = (scratch.take(w.qkv.product.r), *(scratch.take(p.product.r)[:n] for p in (w.o, w.gate_up, w.down)))
        dgu, h, dout = scratch.take(w.gate_up.product.n)[:n], own.take(w.down.product.k)[:n], scratch.take(d)[:n]
        dy, g_after_down = behind(w.after_down, k.alone[1], k.narrow[2], dx, dout)
        dy, sums = w.down.before_gain(dy, k.alone[1], dout)
        w.down.product.backward(dy, low[3], dgu, "swiglu_backward", k.gu, h)
        g_down = w.down.gradients(h if w.down.reads else None, k.low[3], dy, low[3], sums)
        dn_all = scratch.take(d)
        dn = dn_all[:n]
        dgu, sums = w.gate_up.before_gain(dgu, k.gu, dgu)
        w.gate_up.product.backward(dgu, low[2], dn)
        xn2 = self._normed_again(k.mid, w.norm2, rstd2, w.gate_up.reads or w.beside is not None, own)
        g_gate_up = w.gate_up.gradients(xn2, k.low[2], dgu, low[2], sums)
        g_beside = beside(w.beside, xn2, k.narrow[1], dx, dn)
        dmid = scratch.take(d)[:n]
        g_norm2 = self._rmsnorm_backward(dn, k.mid, w.norm2, rstd2, dx, dmid)
        dattended = scratch.take(w.o.product.k)[:n]
        dy, g_after_o = behind(w.after_o, k.alone[0], k.narrow[0], dmid, dout)
        dy, sums = w.o.before_gain(dy, k.alone[0], dout)
        w.o.product.backward(dy, low[1], dattended)
        g_o = w.o.gradients(k.chosen[1], k.low[1], dy, low[1], sums)
        if k.rows is not None:
            dmid, dattended = spread_rows(dmid, k.rows, b.total), spread_rows(dattended, k.rows, b.total)
        dqkv = scratch.take(w.qkv.product.n)
        self.attend.backward(dattended, k.qkv, k.attended, b.at, k.seen, dqkv)
        if b.prefix is not None:
            g_before.append(b.prefix.take(dqkv))
        self._rope(dqkv, b, -1.0)
        dqkv, sums = w.qkv.before_gain(dqkv, self._product_again(w, k, b), dqkv)
        g_norm1: list[Tensor] = []
        if to is None:
            w.qkv.product.backward(dqkv, low[0], None)
        else:
            w.qkv.product.backward(dqkv, low[0], dn_all)
            g_norm1 = self._rmsnorm_backward(dn_all, k.x, w.norm1, rstd1, dmid, to)
        xn = self._normed_again(k.x, w.norm1, rstd1, w.qkv.reads, own)
        g_qkv = w.qkv.gradients(xn, k.low[0], dqkv, low[0], sums)
        g_bottlenecks = [*g_after_o, *g_beside, *g_after_down]
        return [*g_qkv, *g_o, *g_gate_up, *g_down, *g_bottlenecks, *g_norm1, *g_norm2]

    def _product_again(self, w: Layer, k: Kept, b: Packed) -> Tensor | None:
        """Queries, keys and values as the product made them, in the place of what attention read; only for gains."""
        if w.qkv.product.gain is None or k.qkv is None:
            return None
        self._rope(k.qkv, b, -1.0)
        return k.qkv if w.qkv.bias is None else k.qkv.sub_(w.qkv.bias)

    def _normed_again(self, x: Tensor, norm: Norm, rstd: Tensor, wanted: bool, own: Room) -> Tensor | None:
        """What the norm said in the forward, where a gradient needs it."""
        return self._rmsnorm(x, norm.weight, own.take(x.shape[1])[: x.shape[0]], rstd) if wanted else None

    def _rmsnorm_backward(
        self, dy: Tensor, x: Tensor, norm: Norm, rstd: Tensor, residual: Tensor | None, to: Tensor
    ) -> list[Tensor]:
        """Fill `to`; returns the gradient of the norm's weight if it is trained."""
        ld = 0 if residual is None else residual.stride(0)
        dw = torch.zeros(self.kernels.threads, x.shape[1]) if norm.trained else None
        first = (dy, dy.stride(0), x, x.stride(0), norm.weight, rstd, residual, ld, to, to.stride(0))
        self.kernels.rows("rmsnorm_backward", self.dtype, *first, dw, x.shape[0], x.shape[1])
        return [] if dw is None else [dw.sum(0)]


class _Hidden(torch.autograd.Function):
    """The whole stack as one node of autograd."""

    @staticmethod
    def forward(ctx: Any, fast: FastLlama, b: Packed, rows: Tensor | None, keep: bool, *given: Tensor | None) -> Tensor:
        """given: the embeddings that b has, or None, the keys and values of its prefix, or None, and the parameters,
        for autograd to know of them."""
        out, kept, last, rstd = fast.forward(b, rows, keep)
        ctx.fast, ctx.b, ctx.kept, ctx.last, ctx.rstd, ctx.out = fast, b, kept, last, rstd, out.shape
        ctx.values = fast.values.seen
        if not keep:
            ctx.mark_non_differentiable(out)
        return out[: b.n if rows is None else rows.numel()]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.fast.values.require(ctx.values)
        if ctx.kept is None:
            raise RuntimeError("the fast path keeps its forward for one backward only")
        whole = grad.new_zeros(ctx.out)
        whole[: grad.shape[0]] = grad
        grads = ctx.fast.backward(ctx.b, ctx.kept, ctx.last, ctx.rstd, whole)
        ctx.kept = None
        return (None, None, None, None, *grads)
