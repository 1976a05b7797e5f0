"""Soft prompts in a packed row: where everything lands, and attention that sees keys and values before its segment."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from test_ops_attention import qkv, reference
from torch import Tensor

from tunewright.core.example import Example, Group
from tunewright.ops import attention
from tunewright.ops.packing import collate, pack
from tunewright.ops.prefix import share_prefixes
from tunewright.ops.virtual import insert_rows


def group(*lengths: int, start: int = 10, prefix: int = 0) -> Group:
    ids = [tuple(range(start, start + n)) for n in lengths]
    return Group(tuple(Example(i, (0.0,) * prefix + (1.0,) * (len(i) - prefix), 7) for i in ids), prefix=prefix)


def test_rows_are_put_in_front_of_each_segment() -> None:
    batch = collate([group(3), group(2, start=20)])
    batch = replace(batch, noise_T=torch.arange(1, 6), types_T=torch.tensor([0, 1, 1, 0, 1]))
    own_TD = batch.tokens_T[:, None].float()
    grown, rows_RD, at_T = insert_rows(batch, torch.tensor([[1.0], [2.0]]), own_TD)
    assert rows_RD[:, 0].tolist() == [1, 2, 10, 11, 12, 1, 2, 20, 21]
    assert at_T.tolist() == [2, 3, 4, 7, 8]
    assert grown.position_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert grown.cu_seqlens.tolist() == [0, 5, 9] and grown.cu_seqlens.dtype == torch.int32
    assert grown.tokens_T.tolist() == [0, 0, 10, 11, 12, 0, 0, 20, 21]
    assert grown.targets_T[at_T].tolist() == batch.targets_T.tolist()
    assert grown.weights_T.tolist() == [0, 0, 1, 1, 0, 0, 0, 1, 0]
    assert grown.last_S.tolist() == [4, 8]
    assert grown.noise_T is not None and grown.noise_T.tolist() == [0, 0, 1, 2, 3, 0, 0, 4, 5]
    assert grown.types_T is not None and grown.types_T[at_T].tolist() == [0, 1, 1, 0, 1]
    assert (grown.group_S.tolist(), grown.source_S.tolist()) == ([0, 1], [7, 7])


def test_a_segment_that_continues_another_sees_its_parent_s_rows() -> None:
    batch = share_prefixes([group(4, 5, prefix=3)])
    assert attention.prefixes_of(batch) == [(-1, 0), (0, 2), (0, 2)]
    grown, rows_RD, at_T = insert_rows(batch, torch.zeros(6, 1), torch.ones(batch.n_tokens, 1))
    assert grown.cu_seqlens.tolist() == [0, 9, 11, 14]
    assert attention.prefixes_of(grown) == [(-1, 0), (0, 8), (0, 8)]
    assert rows_RD[:, 0].tolist() == [0.0] * 6 + [1.0] * 8
    assert at_T.tolist() == list(range(6, 14))


def test_the_gradient_of_a_row_is_summed_over_the_segments() -> None:
    rows_ND = torch.zeros(2, 3, requires_grad=True)
    _, rows_RD, _ = insert_rows(collate([group(3), group(1)]), rows_ND, torch.zeros(4, 3))
    rows_RD.sum().backward()
    assert rows_ND.grad is not None and rows_ND.grad.tolist() == [[2.0] * 3] * 2


def test_virtual_tokens_count_in_a_micro_batch() -> None:
    groups = [group(n) for n in (4, 4, 4)]
    assert [b.n_segments for b in pack(groups, 12)] == [3]
    assert [b.n_segments for b in pack(groups, 12, virtual=2)] == [2, 1]


def before_reference(q: Tensor, k: Tensor, v: Tensor, cu: list[int], own: tuple[Tensor, Tensor], window: int | None):
    """Each segment with its own copy of what is before it, by the masked softmax."""
    n, outs = own[0].shape[2], []
    for a, b in pairwise(cu):
        keys, values = (torch.cat([x, y[:, :, a:b]], 2) for x, y in zip(own, (k, v), strict=True))
        queries = torch.cat([torch.zeros_like(q[:, :, :1]).expand(-1, -1, n, -1), q[:, :, a:b]], 2)
        outs.append(reference(queries, keys, values, [0, n + b - a], window)[:, :, n:])
    return torch.cat(outs, 2)


@pytest.mark.parametrize("together", [0, 8])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_what_is_before_every_segment(
    together: int, window: int | None, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "TOGETHER", together)
    cu, g = [0, 5, 6, 13], torch.Generator().manual_seed(5)
    q, k, v = (x.detach().float().requires_grad_() for x in qkv(kv_heads=kv_heads))
    own = tuple(torch.randn(1, kv_heads, 3, 8, generator=g).requires_grad_() for _ in range(2))
    assert len(own) == 2
    upstream = torch.randn(1, 4, 13, 8, generator=g)
    got = attention.segment_attention(q, k, v, cu, window=window, before=own)
    want = before_reference(q, k, v, cu, own, window)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for a, b in zip(*(torch.autograd.grad((x * upstream).sum(), (q, k, v, *own)) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
