"""Who runs when."""

from __future__ import annotations

from typing import Any

import pytest

from tunewright.core.errors import Busy
from tunewright.engine.kv_cache import KVCache
from tunewright.engine.request import parse_request, settle
from tunewright.engine.scheduler import Limits, Scheduler, Sequence
from tunewright.engine.text import TextStream

KV = KVCache(1000)
HOW = settle(parse_request({"base": "m", "prompt": "x"}), {})


def sequence(n: int, done: int = 0) -> Sequence:
    s = Sequence(None, 0, [1] * n, n, n + 10, HOW, TextStream(lambda ids: ""))
    s.cache = KV.open(n)
    s.cache.length = done
    return s


def lengths(plan: list[tuple[Sequence, int]]) -> list[int]:
    return [n for _, n in plan]


def test_decoding_never_waits_for_prompts() -> None:
    scheduler = Scheduler(Limits(chunk_tokens=100))
    scheduler.running = [sequence(70, 69), sequence(80), sequence(300), sequence(50, 49), sequence(9)]
    assert lengths(scheduler.plan()) == [1, 80, 20, 1]


def test_a_long_prompt_is_computed_in_pieces() -> None:
    scheduler = Scheduler(Limits(chunk_tokens=100))
    s = sequence(250)
    scheduler.running = [s]
    seen = []
    while s.n_new > 1 or not seen:
        ((_, n),) = scheduler.plan()
        seen.append(n)
        s.place.length += n
    assert seen == [100, 100, 50]


def test_first_come_first_served() -> None:
    scheduler = Scheduler(Limits(max_running=2))
    a, b, c = (sequence(5) for _ in range(3))
    scheduler.add([a, b])
    scheduler.add([c])
    scheduler.admit(lambda s: True)
    assert scheduler.running == [a, b] and list(scheduler.waiting) == [c]
    scheduler.remove(a)
    scheduler.admit(lambda s: True)
    assert scheduler.running == [b, c] and scheduler.busy


def test_nobody_overtakes_a_sequence_whose_weights_wait() -> None:
    scheduler = Scheduler(Limits())
    a, b = sequence(5), sequence(5)
    scheduler.add([a, b])
    asked: list[Any] = []
    scheduler.admit(lambda s: bool(asked.append(s)))
    assert asked == [a] and not scheduler.running


def test_one_that_cannot_start_leaves_the_queue_and_the_next_starts() -> None:
    scheduler = Scheduler(Limits())
    a, b = sequence(5), sequence(5)
    scheduler.add([a, b])

    def start(s: Sequence) -> bool:
        if s is a:
            scheduler.remove(a)
            a.finish_reason = "aborted"
        return True

    scheduler.admit(start)
    assert scheduler.running == [b] and not scheduler.waiting


def test_a_full_queue_refuses() -> None:
    scheduler = Scheduler(Limits(max_waiting=3))
    scheduler.add([sequence(5) for _ in range(3)])
    with pytest.raises(Busy) as e:
        scheduler.add([sequence(5)])
    assert e.value.status == 503 and e.value.code == "queue_full" and "Try again" in e.value.message


def test_a_large_request_is_accepted_by_an_empty_queue() -> None:
    scheduler = Scheduler(Limits(max_waiting=3))
    scheduler.add([sequence(5) for _ in range(20)])
    assert len(scheduler.waiting) == 20
