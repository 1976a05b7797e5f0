"""Layers in their serving form against the plain ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tunewright.engine.linear import Pair, ServeLinear, ServeNorm, can_pack, prepare

needs_packing = pytest.mark.skipif(
    not can_pack(torch.zeros(2, 2, dtype=torch.bfloat16)), reason="this CPU has no fast bfloat16"
)


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.one = nn.Linear(48, 32, bias=True, dtype=dtype)
        self.two = nn.Sequential(nn.Linear(32, 16, bias=False, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))


@needs_packing
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 100])
def test_packed_is_plain_up_to_rounding(rows: int) -> None:
    torch.manual_seed(rows)
    net, x = Net(torch.bfloat16), torch.randn(1, rows, 48, dtype=torch.bfloat16)
    with torch.inference_mode():
        wanted = net(x)
        exact = net.float()(x.float())
        prepare(net.bfloat16())
        assert isinstance(net.one, ServeLinear) and net.one.packed is not None
        found = net(x)
    assert (found.float() - exact).abs().max() <= 1.5 * (wanted.float() - exact).abs().max() + 1e-6


def test_float32_is_untouched() -> None:
    net, x = Net(torch.float32), torch.randn(1, 5, 48)
    with torch.inference_mode():
        wanted = net(x)
        prepare(net)
        assert torch.equal(net(x), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_change_their_rows_only(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net, x = Net(dtype), torch.randn(1, 6, 48, dtype=dtype)
    routing = prepare(net)
    pairs = {name: Pair(torch.randn(48, 3), torch.randn(3, 32)) for name in ("a", "b")}
    layer = net.one
    assert isinstance(layer, ServeLinear)
    layer.pairs = pairs
    with torch.inference_mode():
        plain = layer(x)
        routing.parts = [("a", torch.tensor([4, 1])), ("b", torch.tensor([3])), ("absent", torch.tensor([0]))]
        mixed = layer(x)
        routing.parts = [("a", None)]
        whole = layer(x)
    assert torch.equal(mixed[0, [0, 2, 5]], plain[0, [0, 2, 5]])
    assert torch.equal(mixed[0, [1, 4]], whole[0, [1, 4]])
    wanted = plain[0].float() + x[0].float() @ pairs["a"].a @ pairs["a"].b
    torch.testing.assert_close(whole[0].float(), wanted, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-2)
    assert not torch.equal(mixed[0, 3], plain[0, 3])


def test_the_norm_is_transformers() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    norm, x = LlamaRMSNorm(64, eps=1e-5), torch.randn(1, 7, 64) * 5
    norm.weight.data.normal_()
    torch.testing.assert_close(ServeNorm(norm)(x), norm(x), rtol=1e-6, atol=1e-6)
