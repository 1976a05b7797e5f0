"""The cache against a plain model of it: each sequence's keys stay its own, whatever moves, grows or leaves."""

from __future__ import annotations

import random

import pytest
import torch

from tunewright.engine.kv_cache import SMALLEST, Cache, KVCache

LAYERS = 2


def write(cache: Cache, at: int, value: float) -> None:
    one = torch.full((1, 2, 1, 4), value)
    for layer in range(LAYERS):
        keys, values = cache.pool.layer(layer, one, one[..., :3])
        keys[cache.slot, :, at] = value + layer
        values[cache.slot, :, at] = -value - layer


def contents(cache: Cache) -> list[float]:
    found = []
    for at in range(cache.length):
        for layer in range(LAYERS):
            keys, values = cache.pool.k[layer], cache.pool.v[layer]
            cell = keys[cache.slot, :, at]
            assert bool((cell == cell[0, 0]).all()) and float(values[cache.slot, 0, at, 0]) == -float(cell[0, 0])
        found.append(float(cache.pool.k[0][cache.slot, 0, at, 0]))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_random_lives(seed: int) -> None:
    rng = random.Random(seed)
    kv = KVCache(4 * SMALLEST)
    wanted: dict[Cache, list[float]] = {}
    stamp = 0.0
    for _ in range(300):
        action = rng.random()
        if action < 0.25 and len(wanted) < 9:
            wanted[kv.open(rng.randrange(1, 3 * SMALLEST))] = []
        elif action < 0.35 and wanted:
            cache = rng.choice(list(wanted))
            del wanted[cache]
            kv.close(cache)
        elif wanted:
            cache = rng.choice(list(wanted))
            for _ in range(rng.randrange(1, 60)):
                if cache.length < kv.limit:
                    kv.reserve(cache, cache.length + 1)
                    stamp += 10
                    write(cache, cache.length, stamp)
                    wanted[cache].append(stamp)
                    cache.length += 1
        for pool in kv.pools:
            assert [c.slot for c in pool.owners] == list(range(len(pool.owners)))
    for cache, values in wanted.items():
        assert contents(cache) == values
    for cache in wanted:
        kv.close(cache)
    assert kv.n_sequences == 0 and kv.bytes == 0


def test_a_pool_is_at_most_twice_what_a_sequence_needs() -> None:
    kv = KVCache(1000)
    assert [p.size for p in kv.pools] == [128, 256, 512, 1000]
    for length in (1, 128, 129, 513, 1000):
        cache = kv.open(length)
        assert length <= cache.pool.size <= max(SMALLEST, 2 * length)
    with pytest.raises(ValueError, match="1001 tokens"):
        kv.open(1001)


def test_closing_twice_is_an_error() -> None:
    kv = KVCache(100)
    cache = kv.open(5)
    kv.close(cache)
    with pytest.raises(ValueError, match="no place"):
        kv.close(cache)
