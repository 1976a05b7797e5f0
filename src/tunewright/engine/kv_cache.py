"""Keys and values of running sequences, in pools by size, so that one attention call serves a whole pool.

A pool holds sequences of up to `size` tokens as one tensor a layer, [slots, heads, size, dim], with its sequences
always in slots 0..n-1. A sequence that outgrows its pool moves to the next one, which is twice as large; so at most
half of what is allocated for a sequence is empty, and growing costs a copy per doubling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

SMALLEST = 128


@dataclass
class Pool:
    """Slots of one size. k, v: a tensor a layer, made when the layer first writes (shapes are the model's own)."""

    size: int
    k: dict[int, Tensor] = field(default_factory=dict)
    v: dict[int, Tensor] = field(default_factory=dict)
    owners: list[Cache] = field(default_factory=list)

    def take(self, owner: Cache) -> int:
        self.owners.append(owner)
        if any(t.shape[0] < len(self.owners) for t in self.k.values()):
            for tensors in (self.k, self.v):
                for layer, old in tensors.items():
                    new = old.new_zeros(2 * old.shape[0], *old.shape[1:])
                    new[: old.shape[0]] = old
                    tensors[layer] = new
        return len(self.owners) - 1

    def give(self, slot: int) -> None:
        """Free a slot; the last sequence moves into it. An empty pool gives its memory back."""
        last = self.owners.pop()
        if slot < len(self.owners):
            for tensors in (self.k, self.v):
                for t in tensors.values():
                    t[slot, :, : last.length] = t[len(self.owners), :, : last.length]
            self.owners[slot] = last
            last.slot = slot
        if not self.owners:
            self.k, self.v = {}, {}

    def layer(self, number: int, key_BHTK: Tensor, value_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's tensors, [slots, heads, size, dim]; made now if this is its first write."""
        if number not in self.k:
            slots = max(4, 1 << (len(self.owners) - 1).bit_length())
            for tensors, like in ((self.k, key_BHTK), (self.v, value_BHTK)):
                # zeros, not empty: a masked position still enters the product, and 0 * NaN is NaN
                tensors[number] = like.new_zeros(slots, like.shape[1], self.size, like.shape[3])
        return self.k[number], self.v[number]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for tensors in (self.k, self.v) for t in tensors.values())


@dataclass(eq=False)
class Cache:
    """One sequence's place: which pool and slot, and how many tokens are in it."""

    pool: Pool
    slot: int = -1
    length: int = 0


class KVCache:
    """The pools of one model. limit: the model's context; no pool is larger than needed for it."""

    def __init__(self, limit: int) -> None:
        sizes = [SMALLEST]
        while sizes[-1] < limit:
            sizes.append(sizes[-1] * 2)
        self.limit = limit
        self.pools = [Pool(min(size, max(limit, SMALLEST))) for size in sizes]

    def open(self, length: int) -> Cache:
        """A place for a new sequence that is expected to have `length` tokens. Raises ValueError beyond the limit."""
        cache = Cache(self._fitting(length))
        cache.slot = cache.pool.take(cache)
        return cache

    def reserve(self, cache: Cache, length: int) -> None:
        """Make room for `length` tokens, moving the sequence to a larger pool if need be."""
        if length <= cache.pool.size:
            return
        old, slot = cache.pool, cache.slot
        new = self._fitting(length)
        cache.pool, cache.slot = new, new.take(cache)
        for layer in old.k:
            there = new.layer(layer, old.k[layer], old.v[layer])
            for target, source in zip(there, (old.k[layer], old.v[layer]), strict=True):
                target[cache.slot, :, : cache.length] = source[slot, :, : cache.length]
        self._leave(old, slot)

    def put(self, cache: Cache, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Begin a new sequence with keys and values [1, H, N, K] of each layer that were computed before."""
        for number, (keys, values) in enumerate(layers):
            for there, given in zip(cache.pool.layer(number, keys, values), (keys, values), strict=True):
                there[cache.slot, :, : given.shape[2]] = given[0]
            cache.length = keys.shape[2]

    def copy(self, source: Cache, target: Cache, length: int) -> None:
        """Begin a new sequence with the first `length` tokens of another one."""
        for layer in list(source.pool.k):
            kept = source.pool.k[layer], source.pool.v[layer]
            for there, given in zip(target.pool.layer(layer, *kept), kept, strict=True):
                there[target.slot, :, :length] = given[source.slot, :, :length]
        target.length = length

    def get(self, cache: Cache) -> list[tuple[Tensor, Tensor]]:
        """The sequence's keys and values [1, H, N, K] of each layer, as copies."""
        pool, slots, end = cache.pool, slice(cache.slot, cache.slot + 1), cache.length
        return [(pool.k[n][slots, :, :end].clone(), pool.v[n][slots, :, :end].clone()) for n in sorted(pool.k)]

    def close(self, cache: Cache) -> None:
        """Free the sequence's place. Closing twice is an error of the caller (ValueError)."""
        if cache.slot < 0:
            raise ValueError("this sequence has no place in the cache any more")
        self._leave(cache.pool, cache.slot)
        cache.slot = -1

    def _leave(self, pool: Pool, slot: int) -> None:
        pool.give(slot)

    def _fitting(self, length: int) -> Pool:
        for pool in self.pools:
            if length <= pool.size:
                return pool
        raise ValueError(f"a sequence of {length} tokens does not fit the context of {self.limit}")

    @property
    def n_sequences(self) -> int:
        return sum(len(p.owners) for p in self.pools)

    @property
    def bytes(self) -> int:
        return sum(p.bytes for p in self.pools)
