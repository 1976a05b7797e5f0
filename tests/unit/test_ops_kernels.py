"""The C++ kernels against torch in float32: each product, attention with its gradients, the vocabulary pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tunewright.ops.kernels import Kernels, KernelsMissing, load_kernels
from tunewright.ops.logprob import TileHead
from tunewright.ops.lora import LowRank, Product, TileProduct, TorchProduct, interleave

B16 = torch.bfloat16


def need_tiles(kernels: Kernels) -> None:
    if not kernels.tiles:
        pytest.skip("this processor has no AMX tiles")


def near(got: Tensor, want: Tensor, tolerance: float = 4e-3) -> None:
    """bfloat16 results: relative to the size of the whole."""
    assert (got.float() - want).norm() <= tolerance * want.norm()
    assert want.norm() > 0


@pytest.fixture
def random() -> Callable[..., Tensor]:
    g = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=g)


def test_without_a_compiler_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(KernelsMissing, match=r"no C\+\+ compiler.*apt install"):
        load_kernels(tmp_path, 1)


@pytest.mark.slow
def test_a_damaged_library_is_compiled_again(kernels: Kernels, tmp_path: Path) -> None:
    whole = Path(kernels._library._name)
    damaged = tmp_path / "damaged" / whole.name
    damaged.parent.mkdir()
    damaged.write_bytes(whole.read_bytes()[:100])
    assert load_kernels(damaged.parent, 1).tiles == kernels.tiles
    assert damaged.stat().st_size == whole.stat().st_size


def test_a_cache_that_cannot_be_written_is_no_crash(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KernelsMissing, match="could not be compiled or loaded"):
        load_kernels(tmp_path / "file" / "below", 1)


def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "bin" / "broken-cxx"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho no such instruction >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(KernelsMissing, match="broken-cxx could not compile the kernels: no such instruction"):
        load_kernels(tmp_path / "cache", 1)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, B16])
def test_rmsnorm_and_its_gradient(kernels: Kernels, random: Callable[..., Tensor], dtype: torch.dtype) -> None:
    x, w, dy = random(37, 96).to(dtype), random(96), random(37, 96).to(dtype)
    y, rstd, dx = torch.empty_like(x), torch.empty(37), torch.empty_like(x)
    kernels.rows("rmsnorm", dtype, x, 96, w, 1e-5, y, 96, rstd, 37, 96)
    kernels.rows("rmsnorm_backward", dtype, dy, 96, x, 96, w, rstd, None, 0, dx, 96, None, 37, 96)
    leaf = x.float().requires_grad_()
    want = leaf * (leaf.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w
    want.backward(dy.float())
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    near(y, want.detach(), tolerance)
    near(dx, leaf.grad, tolerance)  # type: ignore[arg-type]


def by_rows(blocks: Tensor) -> Tensor:
    """[T, n] that lies in blocks of 32 x 32, as rows."""
    rows, columns = blocks.shape
    return blocks.view(rows // 32, columns // 32, 32, 32).transpose(1, 2).reshape(rows, columns)


def test_swiglu_in_the_products(kernels: Kernels, random: Callable[..., Tensor]) -> None:
    """On tiles it is done on the way out of a product; gates far below zero must not become NaN."""
    need_tiles(kernels)
    x, dy, down = random(64, 64).to(B16), random(64, 64).to(B16), random(64, 96).to(B16)
    gate, up = 12 * random(96, 64).to(B16), random(96, 64).to(B16)
    into = TileProduct(kernels, [interleave(gate, up)], [0], [slice(0, 192)], "out")
    out = TileProduct(kernels, [down], [0], [slice(0, 64)], "in")
    gu, h, dgu, again = (torch.empty(64, n, dtype=B16) for n in (192, 96, 192, 96))
    none = torch.empty(64, 0, dtype=B16)
    into.forward(x, none, gu, "swiglu", h)
    out.backward(dy, none, dgu, "swiglu_backward", gu, again)
    gu, h, dgu, again = (by_rows(t) for t in (gu, h, dgu, again))
    rows = gu.T.contiguous().view(6, 2, 16, 64).float()
    g, u = (rows[:, i].reshape(96, 64).T.contiguous().requires_grad_() for i in range(2))
    assert g.min() < -100
    near(gu, (x.float() @ interleave(gate, up).float().T), 4e-3)
    want = F.silu(g) * u
    want.backward(dy.float() @ down.float())
    near(h, want.detach())
    near(again, want.detach())
    near(dgu, interleave(g.grad.T.contiguous(), u.grad.T.contiguous()).T, 8e-3)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, B16])
def test_swiglu_and_its_gradient(kernels: Kernels, random: Callable[..., Tensor], dtype: torch.dtype) -> None:
    gate, up, dh = (4 * random(5, 48).to(dtype) for _ in range(3))
    gu = interleave(gate.T.contiguous(), up.T.contiguous()).T.contiguous()
    h, dgu, again = torch.empty_like(dh), torch.empty_like(gu), torch.empty_like(dh)
    kernels.rows("swiglu", dtype, gu, 96, h, 48, 5, 48)
    kernels.rows("swiglu_backward", dtype, dh, 48, gu, 96, dgu, 96, again, 48, 5, 48)
    g, u = gate.float().requires_grad_(), up.float().requires_grad_()
    want = F.silu(g) * u
    want.backward(dh.float())
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    near(h, want.detach(), tolerance)
    assert torch.equal(again, h)
    near(dgu, interleave(g.grad.T.contiguous(), u.grad.T.contiguous()).T, tolerance)  # type: ignore[union-attr]


def products(kernels: Kernels, kind: type[Product], x: Tensor, dy: Tensor, weights: Tensor, updates: list) -> tuple:
    """(y, dx, gradients) of two layers with ranks 8 and 16 that read the same x."""
    product = kind(kernels, [weights[:64], weights[64:]], [8, 16], [slice(0, 64), slice(64, 160)])
    product.set_updates(updates)
    product.refresh()
    y, dx = torch.empty(x.shape[0], 160, dtype=x.dtype), torch.empty_like(x)
    u, du = (x.new_empty(x.shape[0], product.r) for _ in range(2))
    product.forward(x, u, y)
    product.backward(dy, du, dx)
    return y, dx, product.gradients(x, u, dy, du)


@pytest.mark.parametrize(("kind", "dtype"), [(TileProduct, B16), (TorchProduct, B16), (TorchProduct, torch.float32)])
def test_a_product_with_two_updates(
    kernels: Kernels, random: Callable[..., Tensor], kind: type[Product], dtype: torch.dtype
) -> None:
    if kind is TileProduct:
        need_tiles(kernels)
    x, dy, w = random(96, 128).to(dtype), random(96, 160).to(dtype), random(160, 128).to(dtype)
    updates = [LowRank(random(8, 128), random(64, 8), 2.0), LowRank(random(16, 128), random(96, 16), 0.5)]
    y, dx, grads = products(kernels, kind, x, dy, w, updates)
    leaves = [t.clone().requires_grad_() for u in updates for t in (u.a, u.b)]
    xf = x.float().requires_grad_()
    low = [2.0 * xf @ leaves[0].T @ leaves[1].T, 0.5 * xf @ leaves[2].T @ leaves[3].T]
    want = xf @ w.float().T + torch.cat(low, 1)
    want.backward(dy.float())
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    near(y, want.detach(), tolerance)
    near(dx, xf.grad, tolerance)  # type: ignore[arg-type]
    for got, leaf in zip([t for pair in grads for t in pair], leaves, strict=True):
        near(got, leaf.grad, tolerance)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "dtype"), [(TileProduct, B16), (TorchProduct, B16), (TorchProduct, torch.float32)])
def test_gains_of_a_products_outputs(
    kernels: Kernels, random: Callable[..., Tensor], kind: type[Product], dtype: torch.dtype
) -> None:
    """y = gain * (x W^T), and y without what is added; the gradient before the gains, in place, and the sums."""
    if kind is TileProduct:
        need_tiles(kernels)
    x, w, residual, gain = random(96, 64).to(dtype), random(160, 64).to(dtype), random(96, 160).to(dtype), random(160)
    product = kind(kernels, [w], [0], [slice(0, 160)])
    product.set_updates([None], gain)
    product.refresh()
    y, alone = torch.empty_like(residual), torch.empty_like(residual)
    product.forward(x, x.new_empty(96, 0), y, "add", residual, alone)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    want = gain * (x.float() @ w.float().T)
    near(alone, want, tolerance)
    near(y, want + residual.float(), tolerance)
    dy = random(96, 160).to(dtype)
    dz = dy.clone()
    sums = product.before_gain(dz, alone, dz)
    near(dz, gain * dy.float(), tolerance)
    near(sums, (dy.float() * alone.float()).sum(0), 1e-5)


@pytest.mark.parametrize(("kind", "dtype"), [(TileProduct, B16), (TorchProduct, B16), (TorchProduct, torch.float32)])
def test_biases_and_gelu_come_with_the_products(
    kernels: Kernels, random: Callable[..., Tensor], kind: type[Product], dtype: torch.dtype
) -> None:
    """y = x W^T + b, h = gelu(y); back: (dh V) * gelu'(y), gelu(y) once more, and the sums of columns."""
    if kind is TileProduct:
        need_tiles(kernels)
    x, up, down = random(64, 96).to(dtype), random(160, 96).to(dtype), random(64, 160).to(dtype)
    bias, d = random(160).to(dtype), random(64, 64).to(dtype)
    none, y, h, again, dy = torch.empty(64, 0, dtype=dtype), *(torch.empty(64, 160, dtype=dtype) for _ in range(4))
    product = kind(kernels, [up], [0], [slice(0, 160)])
    product.forward(x, none, y, "bias", bias)
    want = x.float() @ up.float().T + bias.float()
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    near(y, want, tolerance)
    product.forward(x, none, y, "gelu", bias, h)
    near(y, want, tolerance)
    near(h, torch.nn.functional.gelu(want), tolerance)
    other = kind(kernels, [down], [0], [slice(0, 64)])
    other.backward(d, none, dy, "gelu_backward", y, again)
    leaf = y.float().requires_grad_()
    torch.nn.functional.gelu(leaf).backward(d.float() @ down.float())
    near(dy, leaf.grad, tolerance)  # type: ignore[arg-type]
    near(again, torch.nn.functional.gelu(y.float()), tolerance)
    near(product.column_sums(dy), dy.float().sum(0), 1e-5)


def test_an_update_that_is_off_leaves_the_base(kernels: Kernels, random: Callable[..., Tensor]) -> None:
    x, dy, w = random(32, 128), random(32, 160), random(160, 128)
    y, dx, grads = products(kernels, TorchProduct, x, dy, w, [None, None])
    assert grads == [None, None]
    near(y, x @ w.T, 1e-6)
    near(dx, dy @ w, 1e-6)


def plain_attention(
    qkv: Tensor, lengths: list[int], heads: int, kv: int, hd: int, window: int, holes: Tensor | None = None
) -> Tensor:
    outs, each = [], [None] * len(lengths) if holes is None else holes.split(lengths)
    for rows, hole in zip(qkv.split(lengths), each, strict=True):
        q, k, v = (
            part.unflatten(1, (-1, hd)).transpose(0, 1) for part in rows.split([heads * hd, kv * hd, kv * hd], 1)
        )
        k, v = k.repeat_interleave(heads // kv, 0), v.repeat_interleave(heads // kv, 0)
        seen = torch.ones(len(rows), len(rows), dtype=torch.bool)
        if window >= 0:
            seen = seen.tril().triu(1 - window if window else -len(rows))
        if hole is not None:
            key = torch.arange(len(rows))
            seen &= (key < hole[:, :1]) | (key >= hole[:, 1:])
        scores = (q @ k.transpose(1, 2) * hd**-0.5).masked_fill(~seen, -torch.inf)
        outs.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    return torch.cat(outs)


@pytest.mark.parametrize("holed", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv", "hd", "window"), [(9, 3, 64, 0), (4, 4, 32, 40), (2, 1, 128, 0), (3, 3, 32, -1)]
)
def test_attention_and_its_gradient(
    kernels: Kernels, random: Callable[..., Tensor], heads: int, kv: int, hd: int, window: int, holed: bool
) -> None:
    """Also where the last tokens of a segment do not see some in its middle, more than a block of keys among them."""
    need_tiles(kernels)
    lengths = [1, 33, 64, 129, 700 if holed else 300]
    holes = torch.zeros(sum(lengths), 2, dtype=torch.int64)
    for end, length, seen, own in ((98, 64, 1, 9), (227, 129, 40, 50), (927, 700, 7, 90)) if holed else ():
        holes[end - own : end] = torch.tensor([seen, length - own])
    total, width = sum(lengths), (heads + 2 * kv) * hd
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    qkv, dout = random(total + 32, width).to(B16), random(total + 32, heads * hd).to(B16)
    out, grad, lse = torch.zeros_like(dout), torch.zeros_like(qkv), torch.empty(heads, total + 32)

    def parts(t: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        return t, t[:, heads * hd :], t[:, (heads + kv) * hd :], width

    sizes = (starts, len(lengths), heads, kv, hd, hd**-0.5, window, out, heads * hd, lse, total + 32)
    sizes = (*sizes, holes if holed else None)
    kernels("attention_tiles", *parts(qkv), *sizes)
    kernels("attention_backward_tiles", *parts(qkv), *sizes, dout, heads * hd, *parts(grad))
    leaf = qkv[:total].float().requires_grad_()
    want = plain_attention(leaf, lengths, heads, kv, hd, window, holes)
    want.backward(dout[:total].float())
    near(out[:total], want.detach())
    assert not out[total:].any() and not grad[total:].any()
    for name, columns in {"q": slice(0, heads * hd), "kv": slice(heads * hd, None)}.items():
        assert leaf.grad is not None, name
        near(grad[:total, columns], leaf.grad[:, columns])


def test_the_vocabulary_in_one_pass(kernels: Kernels, random: Callable[..., Tensor]) -> None:
    """Sizes that are no multiples of a tile; logits far apart, so that the running maximum moves."""
    need_tiles(kernels)
    h, weight = random(77, 96).to(B16), (random(1003, 96) * torch.linspace(0.05, 1.5, 1003)[:, None]).to(B16)
    targets = torch.arange(77) * 13
    logp, correct, entropy, mean, _, grad = TileHead(kernels, weight, 0.7).stats(h, targets, True, True)
    leaf = h.float().requires_grad_()
    want = (0.7 * leaf @ weight.float().T).log_softmax(-1)
    chosen = want.gather(1, targets[:, None])[:, 0]
    chosen.sum().backward()
    torch.testing.assert_close(logp, chosen.detach(), atol=1e-4, rtol=1e-5)
    assert torch.equal(correct, (want.argmax(-1) == targets).float())
    torch.testing.assert_close(entropy, -(want.exp() * want).sum(-1).detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mean, want.mean(-1).detach(), atol=1e-4, rtol=1e-5)
    near(grad, leaf.grad)  # type: ignore[arg-type]


def test_the_vocabulary_when_the_head_is_trained(kernels: Kernels, random: Callable[..., Tensor]) -> None:
    need_tiles(kernels)
    h, weight = random(77, 96).to(B16), random(1003, 96).to(B16)
    targets, factor = torch.arange(77) * 13, torch.linspace(-1, 2, 77)
    head = TileHead(kernels, weight, 0.7)
    lse = head.stats(h, targets, False, False)[4]
    dh, dw = head.gradients(h, targets, lse, factor)
    hf, wf = h.float().requires_grad_(), weight.float().requires_grad_()
    want = (0.7 * hf @ wf.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (want * factor).sum().backward()
    near(dh, hf.grad)  # type: ignore[arg-type]
    near(dw, wf.grad)  # type: ignore[arg-type]
