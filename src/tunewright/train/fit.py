"""Which micro-batch and checkpointing fit into the memory: tried from the fastest on, measured with the longest rows.

A setting is run only if counting says that it fits, and what is measured corrects the counting; so nothing is run that
would exhaust the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tunewright.core.errors import OutOfMemory, is_out_of_memory
from tunewright.core.example import Group
from tunewright.data.rendered import TOKENS, sizes
from tunewright.models import memory
from tunewright.models.memory import CHECKPOINTING, Setting
from tunewright.train import meter
from tunewright.train.loop import Parts, Terms, run_terms
from tunewright.train.plan import Plan, epoch_rows
from tunewright.tuners.base import parameter_bytes

SMALLEST = 128
STARTS = 32  # micro-batches that are filled to find the fullest
CAUTION = 1.15  # on what a small micro-batch says of a large one
# on a micro-batch, where steps have several: the holes that pieces of other sizes leave in the allocator's heap
HOLES = {"plain": 1.5, "fast": 1.1}
# what a step costs against the fastest setting: recomputing layers, and less efficient products of few rows
RECOMPUTING = {"none": 1.0, "selective": 1.17, "full": 1.34}
FEW_ROWS = ((2048, 1.0), (1024, 1.04), (512, 1.1), (256, 1.25), (0, 1.5))


@dataclass(frozen=True)
class Room:
    """limit: bytes that the job may hold. shape: models.shape.shape_of the model. state: bytes that the optimizer will
    allocate. fixed: bytes held whatever the setting, optimizer and gradients included. could_be_nf4: numbers of the
    base that quantization could hold in 4 bits."""

    limit: int
    shape: dict[str, Any]
    tuner: str
    state: int
    fixed: int
    could_be_nf4: int = 0

    def activations(self, tokens: int, checkpointing: str, dtype: str) -> float:
        """By counting."""
        p = memory.parts(self.shape, Setting(self.tuner, dtype, checkpointing, tokens=tokens))
        return p["activations"] + p["head"]


def fitting(parts: Parts, room: Room, peak: meter.Peak) -> Iterator[Parts]:
    """The parts with each setting whose heaviest micro-batch fits, the fastest first.

    Raises OutOfMemory with the numbers and the nearest change that fits when there is no further one.
    """
    small, large = 0.0, 0.0  # measured against counted, of a small micro-batch and of those tried; unknown at first
    dtype = parts.plan.dtype
    least = float("inf")
    fullest = fullest_step(parts.plan, parts.groups)
    for tokens, checkpointing in settings(parts, fullest):
        heavy = heaviest_of(parts, fullest, tokens)
        counted = room.activations(
            max(_tokens(rows) for _, rows in work_of(parts, heavy, tokens)), checkpointing, dtype
        )
        tried = with_setting(parts, tokens, checkpointing)
        if not (small or large) and room.fixed + counted > 0.4 * room.limit:
            small = _calibrate(tried, room, peak, tokens)
        holes = HOLES[parts.plan.path] if has_several(tried) else 1.0
        expected = room.fixed + counted * (max(small * holes, large) or 1.0)
        least = min(least, expected)
        if expected > room.limit:
            continue
        used = run_heaviest(tried, heavy, peak)
        if used is not None and used + room.state <= room.limit:
            yield tried
        large = max(large, ((used or room.limit) - room.fixed + room.state) / counted)
    raise OutOfMemory(refusal(parts, room, least, max(small, large, 0.1)))


def settings(parts: Parts, fullest: Sequence[int]) -> list[tuple[int, str]]:
    """(micro-batch tokens, checkpointing), the fastest first. What the job fixes is kept, but a micro-batch may shrink.

    Sizes at which the heaviest micro-batch is the same one appear once.
    """
    first, kinds = parts.plan.micro_batch_tokens, CHECKPOINTING
    if parts.spec.checkpointing != "auto":
        kinds = (parts.spec.checkpointing,)
    sizes_ = [first]
    while sizes_[-1] // 2 >= SMALLEST:
        sizes_.append(sizes_[-1] // 2)
    distinct = {_tokens(heaviest_of(parts, fullest, t)): t for t in reversed(sizes_)}
    found = [(t, kind) for t in distinct.values() for kind in kinds]
    return sorted(found, key=lambda s: RECOMPUTING[s[1]] * next(c for t, c in FEW_ROWS if s[0] >= t))


def fullest_step(plan: Plan, groups: Sequence[Group]) -> list[int]:
    """The rows of the job's step that has the most tokens."""
    lengths, most, rows = sizes(groups)[:, TOKENS], 0, []
    for epoch in range(plan.n_epochs):
        ordered = epoch_rows(plan, epoch)
        sums = np.add.reduceat(lengths[ordered], np.arange(0, plan.n_rows, plan.batch_size))
        if sums.max() > most:
            at = int(sums.argmax()) * plan.batch_size
            most, rows = sums.max(), ordered[at : at + plan.batch_size].tolist()
    return rows


def heaviest_of(parts: Parts, fullest: Sequence[int], tokens: int) -> list[Group]:
    """The job's heaviest micro-batch: its fullest step where that is one micro-batch, else one as full as can be."""
    whole = [parts.groups[i] for i in fullest]
    return whole if _tokens(whole) <= tokens else heaviest(parts.groups, tokens, parts.plan.batch_size)


def work_of(parts: Parts, heavy: Sequence[Group], tokens: int) -> list[tuple[Terms, Sequence[Group]]]:
    """What a step runs at its heaviest: the objective over `heavy`, and each method against forgetting over the same,
    or over the heaviest micro-batch of its own rows."""
    own = [m for m in parts.retain if len(m.draw(1, heavy))]
    return [(parts.objective, heavy), *((m, heaviest(m.rows, tokens, m.n) if len(m.rows) else heavy) for m in own)]


def heaviest(groups: Sequence[Group], tokens: int, batch_size: int) -> list[Group]:
    """The fullest micro-batch that a step could have: a group and the longest that still fit, from several starts."""
    lengths = sizes(groups)[:, TOKENS]
    longest_first = np.argsort(-lengths, kind="stable")
    negative = -lengths[longest_first]
    starts = np.unique(np.linspace(0, len(lengths) - 1, STARTS).astype(int))
    found = [_filled(negative, int(start), tokens, batch_size) for start in starts]
    fullest = max(found, key=lambda places: (-negative[places].sum(), (negative[places] ** 2).sum()))
    return [groups[int(i)] for i in longest_first[fullest]]


def _filled(negative: np.ndarray, start: int, tokens: int, batch_size: int) -> list[int]:
    """Places in the ascending negative lengths: the start, and after it each first one for which there is room."""
    places, room, at = [start], tokens + int(negative[start]), start + 1
    while len(places) < batch_size:
        at = max(at, int(np.searchsorted(negative, -room)))
        if at >= len(negative):
            break
        places.append(at)
        room += int(negative[at])
        at += 1
    return places


def with_setting(parts: Parts, tokens: int, checkpointing: str) -> Parts:
    parts.policy.set_checkpointing(checkpointing)
    return replace(parts, plan=replace(parts.plan, micro_batch_tokens=tokens, checkpointing=checkpointing))


def run_heaviest(parts: Parts, heavy: Sequence[Group], peak: meter.Peak) -> int | None:
    """Bytes at the peak of forward and backward over the heaviest micro-batch; None when memory ran out.

    Where steps have several micro-batches it is run twice: the gradients of the first are there in the second, and the
    allocator's holes.
    """
    drop_gradients(parts)
    meter.release()
    peak.restart()
    try:
        for _ in range(2 if has_several(parts) else 1):
            for terms, rows in work_of(parts, heavy, parts.plan.micro_batch_tokens):
                run_terms(parts, terms, rows, max(parts.plan.micro_batch_tokens, _tokens(rows)), step=0)
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        return None
    finally:
        drop_gradients(parts)
    return meter.peak()


def has_several(parts: Parts) -> bool:
    """Whether a step of the job may have more than one micro-batch."""
    longest = np.sort(sizes(parts.groups)[:, TOKENS])[-parts.plan.batch_size :].sum()
    return (longest > parts.plan.micro_batch_tokens and parts.plan.batch_size > 1) or len(parts.retain) > 0


def drop_gradients(parts: Parts) -> None:
    for p in parts.tuner.trainable().values():
        p.grad = None


def _calibrate(parts: Parts, room: Room, peak: meter.Peak, tokens: int) -> float:
    """Measured against counted bytes of activations, with a small micro-batch of short rows."""
    short = heaviest(_short(parts.groups), max(SMALLEST, tokens // 8), parts.plan.batch_size)
    used = run_heaviest(parts, short, peak)
    counted = room.activations(_tokens(short), parts.plan.checkpointing, parts.plan.dtype)
    if used is None:
        return 4.0
    before = room.fixed - room.state - parameter_bytes(parts.tuner.at_once())
    return CAUTION * max(0.5, (used - before) / counted)


def _short(groups: Sequence[Group]) -> list[Group]:
    """The eighth of the groups (at most 256) that is shortest."""
    order = np.argsort(sizes(groups)[:, TOKENS], kind="stable")
    return [groups[int(i)] for i in order[: max(1, min(256, len(order) // 8))]]


def _tokens(groups: Sequence[Group]) -> int:
    return sum(g.n_tokens for g in groups)


def refusal(parts: Parts, room: Room, least: float, ratio: float) -> str:
    """What it would take, what there is, and what fits."""
    longest = max(int(sizes(g)[:, TOKENS].max()) for g in (parts.groups, *(m.rows for m in parts.retain)) if len(g))
    given = f"max_memory {parts.spec.max_memory}" if parts.spec.max_memory else "free on this machine"
    text = (
        f"This job does not fit into memory: it needs at least about {least / 1e9:.2f} GB (with micro-batches of one "
        f"row, the longest has {longest} tokens), and {room.limit / 1e9:.2f} GB are there ({given})."
    )
    fixes = list(_fixes(parts, room, longest, ratio))
    return f"{text} What would fit: {'; or '.join(fixes)}."


def _fixes(parts: Parts, room: Room, longest: int, ratio: float) -> Iterator[str]:
    dtype = parts.plan.dtype
    empty = room.fixed + room.activations(1, "full", dtype) * ratio
    a_token = (
        (room.activations(longest, "full", dtype) - room.activations(1, "full", dtype)) * ratio / max(longest - 1, 1)
    )
    fitting = int((room.limit - empty) / a_token) if a_token else 0
    if parts.spec.checkpointing in ("auto", "full") and 8 <= fitting < longest:
        yield f"max_length {fitting} with overlong: truncate or drop"
    elif parts.spec.checkpointing not in ("auto", "full") and fitting >= longest:
        yield "checkpointing: auto"
    saved = room.could_be_nf4 * (memory.BYTES[dtype] - memory.NF4_BYTES)
    if saved and empty + longest * a_token - saved <= room.limit:
        yield f"quantization: nf4 (about {(empty + longest * a_token - saved) / 1e9:.2f} GB)"
    if room.tuner == "full":
        lora = memory.needs(room.shape, Setting("lora", "bfloat16", "full", tokens=longest, rank=8), gpu=False)
        if lora["device"] <= room.limit:
            yield f"tuner: {{name: lora, r: 8}} (about {lora['device'] / 1e9:.2f} GB)"
    yield f"{max(empty + longest * a_token, room.limit * 1.02) * 1.05 / 1e9:.2f} GB of memory"
