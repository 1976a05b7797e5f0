"""Linear layers whose frozen weights are held in 4 or 8 bits and multiplied as what those bits stand for.

The codings are bitsandbytes'; its layers are not used. On a CPU with bfloat16 instructions the first pass of its
Linear4bit in evaluation mode repacks the weights for good, for a kernel that has no backward: from then on no gradient
goes through the layer, so what lies below it does not train. And a layer that is a plain nn.Linear to everybody else
needs no wrapper of its own in any tuner.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunewright.core.errors import UserError
from tunewright.ops.runtime import forget_read, trim

NONE = "none"
PACKAGE = "bitsandbytes"
BLOCK = 64  # weights that share a scale, in nf4
SCALES = 256  # scales that share a scale of their own
PIECE = 1 << 18  # numbers decoded at once, whole blocks of both kinds
TIDIED = 1 << 26  # numbers that are there unquantised at most


@dataclass(frozen=True)
class Coding:
    """encode: a matrix [out, in] -> the tensors that are kept. decode: writes their matrix into a tensor [out, in].

    size: bytes a weight takes, its share of the scales included.
    """

    encode: Callable[[Tensor], dict[str, Tensor]]
    decode: Callable[[Any, Tensor], object]
    size: float


def _encode_nf4(weight: Tensor) -> dict[str, Tensor]:
    """Dettmers et al. 2023 (arXiv 2305.14314, section 3): NF4 codes, and their scales in 8 bits (double
    quantisation)."""
    from bitsandbytes.functional import quantize_4bit  # type: ignore[import-not-found]

    codes, state = quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    outer = state.state2
    return {"codes": codes, "scale": state.absmax, "outer": outer.absmax, "table": outer.code, "offset": state.offset}


def _decode_nf4(kept: Any, out: Tensor) -> None:
    """In pieces, because on a CPU bitsandbytes decodes into new memory only. Each as one row, because with rows that
    are no multiple of a block its kernel for CPUs (0.50) takes the wrong scales."""
    ops, flat = torch.ops.bitsandbytes, out.view(-1)
    for a in range(0, len(flat), PIECE):
        b = min(a + PIECE, len(flat))
        scale, outer = (t[a // n : -(-b // n)] for t, n in ((kept.scale, BLOCK), (kept.outer, BLOCK * SCALES)))
        scale = ops.dequantize_blockwise.default(scale, outer, kept.table, SCALES, torch.float32) + kept.offset
        codes = kept.codes[a // 2 : b // 2]
        flat[a:b] = ops.dequantize_4bit.default(codes, scale, BLOCK, "nf4", (1, b - a), out.dtype)[0]


def _encode_int8(weight: Tensor) -> dict[str, Tensor]:
    """Dettmers et al. 2022 (arXiv 2208.07339, section 2.1): each row scaled by its largest value. What is multiplied
    with it is not quantised."""
    from bitsandbytes.functional import int8_vectorwise_quant  # type: ignore[import-not-found]

    codes, scale, _ = int8_vectorwise_quant(weight.to(torch.float16))
    return {"codes": codes, "scale": scale}


def _decode_int8(kept: Any, out: Tensor) -> None:
    """In pieces, too: torch multiplies numbers of two kinds by way of copies of one kind."""
    rows = max(1, PIECE // out.shape[1])
    scale = kept.scale[:, None] * (1.0 / 127.0)
    for codes, factor, part in zip(kept.codes.split(rows), scale.split(rows), out.split(rows), strict=True):
        torch.mul(codes, factor, out=part)


CODINGS = {
    "nf4": Coding(_encode_nf4, _decode_nf4, 0.5 + 1 / BLOCK + 4 / (BLOCK * SCALES)),
    "int8": Coding(_encode_int8, _decode_int8, 1.0),
}


class Scratch:
    """One piece of memory in which the layers of a model decode in turn: memory of its own for each would leave holes
    between the activations, as large as the whole base. What is in it lasts until the next layer's product."""

    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[rows, columns], not initialised."""
        n = rows * columns * dtype.itemsize
        if len(self.bytes) < n or self.bytes.device != device:
            with torch.inference_mode(False):  # it is used outside of it, too
                self.bytes = torch.empty(n, dtype=torch.uint8, device=device)
        return self.bytes[:n].view(dtype).view(rows, columns)


class Quantised(nn.Linear):
    """A frozen linear layer. weight: [out, in] in `dtype`, decoded anew at each look: a copy, changing it is lost."""

    def __init__(self, layer: nn.Linear, name: str, dtype: torch.dtype, scratch: Scratch) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.coding, self.dtype, self.scratch = CODINGS[name], dtype, scratch
        for key, tensor in self.coding.encode(layer.weight.detach().contiguous()).items():
            self.register_buffer(key, tensor, persistent=False)
        self.register_parameter("bias", layer.bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        device: Any = self.codes.device
        return self._decode(torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=device))

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """[out, in] in the scratch."""
        device: Any = self.codes.device
        return self._decode(self.scratch.take(self.out_features, self.in_features, dtype, device))

    @torch.no_grad()
    def _decode(self, out: Tensor) -> Tensor:
        self.coding.decode(self, out)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in], any floating-point dtype, which is that of the product (under autocast: autocast's)."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y = _Product.apply(x.to(dtype), self)
        return y if self.bias is None else y + self.bias.to(dtype)

    def plain(self) -> nn.Linear:
        """A layer with the decoded weights."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(self.weight, requires_grad=False)
        layer.bias = self.bias
        return layer


class _Product(torch.autograd.Function):
    """x W^T; the backward decodes W again, so nothing of its size is kept between the two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Quantised) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.decoded(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dy @ ctx.layer.decoded(dy.dtype), None


def can_be_quantised(layer: nn.Module) -> bool:
    """A plain linear layer: one of a subclass may compute something else. bitsandbytes packs weights in pairs."""
    return type(layer) is nn.Linear and layer.in_features * layer.out_features % 2 == 0


def quantise(model: nn.Module, name: str, dtype: torch.dtype, keep: Container[nn.Module] = ()) -> None:
    """Replace the linear layers of a model that was just loaded, but those in `keep`, in place and one by one.

    name: a key of CODINGS. dtype: of the computation. Raises UserError if bitsandbytes is missing or no layer can be.
    """
    if find_spec(PACKAGE) is None:
        raise UserError(f"A base in {name} needs the package {PACKAGE}; pip install {PACKAGE}.", param="quantization")
    import bitsandbytes  # type: ignore[import-not-found]  # noqa: F401 registers its operators with torch

    scratch, done, n = Scratch(), list[Tensor](), 0
    for parent, leaf, layer in _children(model):
        if isinstance(layer, nn.Linear) and can_be_quantised(layer) and layer not in keep:
            setattr(parent, leaf, Quantised(layer, name, dtype, scratch))
            done.append(layer.weight.detach())
            n += layer.weight.numel()
        if sum(w.numel() for w in done) >= TIDIED:
            _tidy(done)
    _tidy(done)
    if not n:
        raise UserError(
            f"This model ({type(model).__name__}) has no linear layers that can be held in {name}: GPT-2's are of "
            "another kind. Use quantization: none.",
            param="quantization",
        )


def _tidy(done: list[Tensor]) -> None:
    """Forget these weights, in the file and in memory."""
    forget_read(done)
    done.clear()
    trim()


def dequantise(model: nn.Module) -> nn.Module:
    """The model with plain layers of what the codes stand for, in place: what an adapter is folded into."""
    for parent, leaf, layer in _children(model):
        if isinstance(layer, Quantised):
            setattr(parent, leaf, layer.plain())
    return model


def is_quantised(model: nn.Module) -> bool:
    return any(isinstance(m, Quantised) for m in model.modules())


def count(model: nn.Module) -> int:
    """Parameters of the model, quantised ones included."""
    hidden = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, Quantised))
    return hidden + sum(p.numel() for p in model.parameters())


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, module), safe against replacing them."""
    for parent in list(model.modules()):
        for leaf, module in list(parent.named_children()):
            yield parent, leaf, module
