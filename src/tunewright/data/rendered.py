"""Rendered rows on disk: written once, read one group at a time, so that memory does not grow with the data set.

groups.bin   records of int32, one after another (see _encode)
sizes.npy    [n, 4] int64, one line a group: where its record begins, and the three columns of `sizes`
Rows are read with pread and not through a memory map: the touched pages of a map count as this process's memory.
"""

from __future__ import annotations

import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from tunewright.core.example import Example, Group

RECORDS, SIZES = "groups.bin", "sizes.npy"
TOKENS, SQUARES, SUPERVISED = range(3)
_HEAD, _PER_EXAMPLE = 3, 3
_PLAIN = ("ids", "weights", "source")
_OTHERS = {f.name: f.default for f in fields(Example) if f.name not in _PLAIN}


class Groups(Sequence[Group]):
    """Groups by number, from wherever _at() has number 0 and those after it. sizes: [groups, columns]."""

    sizes: npt.NDArray[np.int64]

    def _at(self, i: int) -> Group:
        raise NotImplementedError

    @overload
    def __getitem__(self, i: int) -> Group: ...
    @overload
    def __getitem__(self, i: slice) -> list[Group]: ...
    def __getitem__(self, i: int | slice) -> Group | list[Group]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"there are {len(self)} groups, but number {i} was asked for")
        return self._at(i % len(self))


class StoredGroups(Groups):
    """The groups that write_groups() left in a folder; each access reads one from the file."""

    def __init__(self, folder: Path) -> None:
        table: npt.NDArray[np.int64] = np.load(folder / SIZES, allow_pickle=False)
        self._starts = np.append(table[:, 0], (folder / RECORDS).stat().st_size)
        self.sizes = np.ascontiguousarray(table[:, 1:])
        self._fd = os.open(folder / RECORDS, os.O_RDONLY)

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def last_source(self) -> int:
        """The number of the last row in its file."""
        return max(e.source for e in self[-1].examples) if len(self) else 0

    def _at(self, i: int) -> Group:
        start, end = (int(x) for x in self._starts[i:][:2])
        return _decode(os.pread(self._fd, end - start, start))

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)


class JoinedGroups(Groups):
    """The groups of several files behind each other. counts: how many each has.

    A row's number goes on from file to file, so that no two rows have the same one.
    """

    def __init__(self, files: Sequence[StoredGroups]) -> None:
        self._files = files
        self.counts = [len(f) for f in files]
        self._ends = list(accumulate(self.counts))
        self.sizes = np.concatenate([f.sizes for f in files])

    def __len__(self) -> int:
        return self._ends[-1]

    def _at(self, i: int) -> Group:
        file = bisect_right(self._ends, i)
        before = self._ends[file - 1] if file else 0
        group = self._files[file][i - before]
        last_before = sum(f.last_source for f in self._files[:file])
        examples = tuple(replace(e, source=e.source + last_before) for e in group.examples)
        return replace(group, examples=examples) if last_before else group


def write_groups(folder: Path, groups: Iterable[Group]) -> int:
    """Write the two files into an existing folder; returns the number of groups."""
    table, at, n = array("q"), 0, 0
    with open(folder / RECORDS, "wb", buffering=1 << 20) as f:
        for group in groups:
            raw = _encode(group)
            f.write(raw)
            table.extend((at, *_size(group)))
            at += len(raw)
            n += 1
    np.save(folder / SIZES, np.frombuffer(table, np.int64).reshape(n, 4) if n else np.zeros((0, 4), np.int64))
    return n


def sizes(groups: Sequence[Group]) -> npt.NDArray[np.int64]:
    """[n, 3] of every group: tokens, sum of the squares of its texts' lengths, tokens with a loss."""
    if isinstance(groups, Groups):
        return groups.sizes
    return np.array([_size(g) for g in groups], np.int64).reshape(len(groups), 3)


def _size(group: Group) -> tuple[int, int, int]:
    lengths = [len(text) for e in group.examples for text in (e.ids, e.source_ids)]
    supervised = sum(w > 0 for e in group.examples for w in e.weights[1:])
    return sum(lengths), sum(n * n for n in lengths), supervised


def _encode(group: Group) -> bytes:
    """prefix, number of examples, bytes of other fields | per example: source, tokens, runs | ids | length of each run
    of equal weights | their weights (float32) | other fields of the examples as JSON, filled up with spaces."""
    runs = [[(w, sum(1 for _ in same)) for w, same in groupby(e.weights)] for e in group.examples]
    others = [{k: getattr(e, k) for k, d in _OTHERS.items() if getattr(e, k) != d} for e in group.examples]
    tail = json.dumps(others).encode() if any(others) else b""
    tail += b" " * (-len(tail) % 4)
    head = [group.prefix, len(group.examples), len(tail)]
    for example, own in zip(group.examples, runs, strict=True):
        head += [example.source, len(example.ids), len(own)]
    flat = [run for own in runs for run in own]
    numbers = [*head, *(t for e in group.examples for t in e.ids), *(n for _, n in flat)]
    return np.array(numbers, np.int32).tobytes() + np.array([w for w, _ in flat], np.float32).tobytes() + tail


def _decode(raw: bytes) -> Group:
    numbers = np.frombuffer(raw, np.int32)
    prefix, n, tail = (int(x) for x in numbers[:_HEAD])
    at = _HEAD + _PER_EXAMPLE * n
    table = numbers[_HEAD:at].reshape(n, _PER_EXAMPLE).tolist()
    runs = sum(row[2] for row in table)
    values_at = at + sum(row[1] for row in table) + runs
    weights = np.repeat(numbers[values_at : values_at + runs].view(np.float32), numbers[values_at - runs : values_at])
    others = json.loads(raw[len(raw) - tail :]) if tail else [{}] * n
    examples, done = [], 0
    for (source, length, _), more in zip(table, others, strict=True):
        ids = numbers[at + done : at + done + length].tolist()
        own = weights[done : done + length].tolist()
        examples.append(Example(tuple(ids), tuple(own), source, **{k: _tuples(v) for k, v in more.items()}))
        done += length
    return Group(tuple(examples), prefix)


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
