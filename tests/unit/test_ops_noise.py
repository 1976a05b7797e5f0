"""The generator of noise: a draw depends on (seed, step, example, position) alone, and looks random."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from tunewright.core.errors import UserError
from tunewright.core.example import Example, Group
from tunewright.ops import noise
from tunewright.ops.packing import collate, pack
from tunewright.ops.types import Batch


def groups(n: int = 7, size: int = 1) -> list[Group]:
    rng = random.Random(0)
    made = []
    for i in range(n):
        lengths = [rng.randint(3, 12) for _ in range(size)]
        made.append(Group(tuple(Example((1,) * k, (1.0,) * k, source=i + 1) for k in lengths)))
    return made


def keys_by_place(batches: list[Batch], seed: int = 3, step: int = 5) -> dict[tuple[int, int, int], int]:
    """{(row, example of its group, position): key} over all batches."""
    found = {}
    for batch in batches:
        key_T = noise.token_keys(batch, seed, step).tolist()
        ends, rows, owner = batch.cu_seqlens.tolist(), batch.source_S.tolist(), batch.group_S.tolist()
        for s in range(batch.n_segments):
            member = s - owner.index(owner[s])
            for position, t in enumerate(range(ends[s], ends[s + 1])):
                found[rows[s], member, position] = key_T[t]
    return found


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("budget", [1, 20, 50])
def test_keys_are_the_same_for_any_cut_and_order(size: int, budget: int) -> None:
    rows = groups(size=size)
    whole = keys_by_place(pack(rows, 10**6))
    assert keys_by_place(pack(rows[::-1], budget)) == whole
    assert len(set(whole.values())) == len(whole) == sum(g.n_tokens for g in rows)


@pytest.mark.parametrize(("seed", "step"), [(4, 5), (3, 6)])
def test_another_seed_or_step_gives_other_keys(seed: int, step: int) -> None:
    batches = pack(groups(), 100)
    assert not set(keys_by_place(batches).values()) & set(keys_by_place(batches, seed, step).values())


def test_the_generator_is_splitmix64() -> None:
    """The first outputs for the seed 1234567, as published with the reference implementation."""
    got = noise._split(torch.tensor(1234567), torch.arange(3)).tolist()
    assert [x % 2**64 for x in got] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def sample(n: int, width: int, place: int = 11) -> torch.Tensor:
    return noise.uniform(noise._split(torch.tensor(7), torch.arange(n)), place, width)


def test_draws_are_uniform() -> None:
    x = sample(500, 402)
    assert x.dtype == torch.float32 and x.shape == (500, 402) and x.abs().max() < 1
    counts = torch.histc(x, bins=64, min=-1, max=1)
    expected = x.numel() / 64
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert 30 < chi2 < 110  # 63 degrees of freedom: both sides beyond 4 standard deviations
    assert abs(x.mean().item()) < 4 * (1 / 3 / x.numel()) ** 0.5


@pytest.mark.parametrize("shift", [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (16, 0)])
def test_neighbours_are_independent(shift: tuple[int, int]) -> None:
    """Features of a token (four come from one hash), tokens, and layers."""
    x = sample(400, 400)
    rows, columns = shift
    a, b = x[rows:, columns:], x[: 400 - rows, : 400 - columns]
    assert abs((a * b).mean().item() * 3) < 4 / a.numel() ** 0.5
    assert abs((x * sample(400, 400, place=12)).mean().item() * 3) < 4 / x.numel() ** 0.5


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_drops_the_share(p: float) -> None:
    key = noise._split(torch.tensor(1), torch.arange(500))
    x = torch.ones(1, 500, 300, requires_grad=True)
    out = noise.dropout(x, key[None], 3, p)
    share = (out == 0).float().mean().item()
    assert share == pytest.approx(p, abs=4 * (p * (1 - p) / x.numel()) ** 0.5)
    assert out[out != 0].unique().tolist() == pytest.approx([1 / (1 - p)], rel=1e-4)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


def test_a_layer_draws_its_own_and_only_where_there_is_noise() -> None:
    a, b = noise.KeyedDropout(0.5, "a"), noise.KeyedDropout(0.5, "b")
    model = nn.ModuleList([a, b])
    x = torch.ones(1, 40, 8, requires_grad=True)
    assert a(x) is x
    key = noise.token_keys(collate(groups()), 0, 1)[None, :40]
    noise.set_keys(model, key)
    assert torch.equal(a(x), a(x)) and not torch.equal(a(x), b(x))
    with torch.no_grad():
        assert a(x) is x
        noise.set_keys(model, None)  # a look at the reference
    assert not torch.equal(a(x), x)
    noise.set_keys(model, None)
    assert a(x) is x


def test_a_layer_that_sees_other_tokens_is_a_clear_error() -> None:
    layer = noise.KeyedDropout(0.5, "experts.3")
    layer.key = torch.zeros(1, 9, dtype=torch.int64)
    with pytest.raises(UserError, match=r"layer experts.3: it runs on \(1, 4\).* \(1, 9\)"):
        layer(torch.ones(1, 4, 2, requires_grad=True))


def test_a_layer_that_is_computed_again_draws_the_noise_of_its_own_batch() -> None:
    layer = nn.Sequential(noise.KeyedDropout(0.5, "x"))
    x = torch.ones(1, 6, 8, requires_grad=True)
    noise.set_keys(layer, torch.arange(6)[None])
    again = noise.keep_keys(layer, layer)
    first = again(x)
    noise.set_keys(layer, torch.arange(6, 12)[None])
    assert not torch.equal(layer(x), first)
    assert torch.equal(again(x), first)


def test_embedding_noise_is_that_of_the_paper() -> None:
    """alpha / sqrt(L d) uniform noise, L of each example alone."""
    batch = collate(groups())
    with_keys = Batch(**{**vars(batch), "noise_T": noise.token_keys(batch, 0, 1)})
    got = noise.embedding_noise(with_keys, width=256, alpha=5.0)
    assert not noise.embedding_noise(batch, width=256, alpha=5.0).any()
    for s, length in enumerate(batch.cu_seqlens.diff().tolist()):
        part = got[batch.cu_seqlens[s] : batch.cu_seqlens[s + 1]]
        bound = 5.0 / (length * 256) ** 0.5
        assert 0.97 * bound < part.abs().max() <= bound
        assert part.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
