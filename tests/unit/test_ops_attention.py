"""Attention: per segment = a full softmax with an explicit mask, forward and backward; what it cannot do is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tunewright.core.errors import UserError
from tunewright.ops import attention

CU = [0, 5, 6, 13]


def qkv(heads: int = 4, kv_heads: int = 2, n: int = 13, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)

    def make(h: int) -> Tensor:
        return torch.randn(1, h, n, dim, generator=g, dtype=torch.float64).requires_grad_()

    return make(heads), make(kv_heads), make(kv_heads)


def reference(q: Tensor, k: Tensor, v: Tensor, cu: list[int], window: int | None = None, causal: bool = True) -> Tensor:
    """Softmax over scores with -inf wherever a token may not look."""
    n, repeat = q.shape[2], q.shape[1] // k.shape[1]
    segment = torch.bucketize(torch.arange(n), torch.tensor(cu[1:]), right=True)
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    allowed = (segment[:, None] == segment[None, :]) & ((j <= i) | (not causal))
    if window is not None:
        allowed &= i - j < window
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("cu", [CU, [0, 13], list(range(14))])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_masked_softmax_with_gradients(cu: list[int], window: int | None, kv_heads: int) -> None:
    q, k, v = qkv(kv_heads=kv_heads)
    upstream = torch.randn(1, 4, 13, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = attention.segment_attention(q, k, v, cu, window=window)
    want = reference(q, k, v, cu, window)
    torch.testing.assert_close(got, want)
    got_grads = torch.autograd.grad((got * upstream).sum(), (q, k, v))
    want_grads = torch.autograd.grad((want * upstream).sum(), (q, k, v))
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("together", [0, 8])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_short_segments_together_and_both_ways(
    together: int, causal: bool, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call a segment, or matrix products over sets of segments of similar length: 5, 1, 7, 7, 2 and 3 tokens."""
    monkeypatch.setattr(attention, "TOGETHER", together)
    cu, upstream = [0, 5, 6, 13, 20, 22, 25], torch.randn(1, 4, 25, 8, dtype=torch.float32)
    inputs = tuple(x.detach().float().requires_grad_() for x in qkv(kv_heads=kv_heads, n=25))
    got = attention.segment_attention(*inputs, cu, causal=causal)
    want = reference(*inputs, cu, causal=causal)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    got_grads = torch.autograd.grad((got * upstream).sum(), inputs)
    want_grads = torch.autograd.grad((want * upstream).sum(), inputs)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_mask": torch.ones(1, 1, 13, 13)}, "an attention mask"),
        ({"dropout": 0.1}, "dropout"),
        ({"softcap": 50.0}, "capped"),
        ({"s_aux": torch.zeros(4)}, "sinks"),
        ({"is_causal": False, "sliding_window": 3}, "looks ahead"),
        ({"position_bias": torch.zeros(1, 4, 13, 13)}, "position bias"),
        ({"cu_seqlens": [0, 5]}, "segments that do not cover"),
    ],
)
def test_what_it_does_not_compute_is_refused(changes: dict[str, object], named: str) -> None:
    q, k, v = qkv()
    kwargs = {"attention_mask": None, "cu_seqlens": CU, **changes}
    with pytest.raises(UserError, match=named):
        attention._forward(nn.Identity(), q, k, v, kwargs.pop("attention_mask"), **kwargs)  # type: ignore[arg-type]


def test_two_rows_in_a_batch_are_refused() -> None:
    q, k, v = (x.expand(2, -1, -1, -1) for x in qkv())
    with pytest.raises(UserError, match="more than one row"):
        attention._forward(nn.Identity(), q, k, v, None)


def test_transformers_builds_no_mask_for_our_implementation(tiny_model_dir) -> None:
    from transformers import AutoConfig
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    config = AutoConfig.from_pretrained(tiny_model_dir)
    config._attn_implementation = attention.register()
    config.sliding_window = 4
    for make in (create_causal_mask, create_sliding_window_causal_mask):
        mask = make(
            config=config,
            inputs_embeds=torch.zeros(1, 6, 64),
            attention_mask=None,
            past_key_values=None,
            position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]),
        )
        assert mask is None
