"""Prompts to another server's answers: in order, several at a time, within a budget; core/asking.py asks each one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from typing import TypeVar

from tunewright.core.asking import Answer, Call, Teacher, ask
from tunewright.core.conversation import Conversation
from tunewright.core.errors import DataError, Interrupted, Problem
from tunewright.data.spans import plain

POLL = 0.2

Row = TypeVar("Row")


@dataclass
class Asked:
    """What became of the rows, filled while they are asked for. left_out: not asked for, because of the budget."""

    rows: int = 0
    answered: int = 0
    kept: int = 0
    tokens: int = 0
    left_out: int = 0
    unusable: int = 0
    reason: str = ""

    def count(self, answer: Answer) -> None:
        self.answered += bool(answer.text)
        self.kept += answer.kept
        self.tokens += answer.tokens
        self.unusable += not answer.text
        self.reason = self.reason or answer.why


def answered_rows(
    rows: Iterable[Conversation],
    teacher: Teacher,
    asked: Asked,
    *,
    budget: int,
    concurrency: int,
    stop: Callable[[], bool],
) -> Iterator[Call]:
    """The rows as chat rows that end with the teacher's answer, in order; unusable answers are left out.

    budget, concurrency, stop, errors: as in_turn has them; also DataError for a row that cannot be asked.
    """

    def one(prompt: list[Call], halt: threading.Event) -> Answer:
        return ask(teacher, prompt, halt)

    prompts = map(prompt_of, rows)
    for prompt, answer in in_turn(prompts, one, asked, budget=budget, concurrency=concurrency, stop=stop):
        if answer.text:
            before = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in prompt]
            yield {"messages": [*before, {"role": "assistant", "content": answer.text}]}


def in_turn(
    rows: Iterable[Row],
    one: Callable[[Row, threading.Event], Answer],
    asked: Asked,
    *,
    budget: int,
    concurrency: int,
    stop: Callable[[], bool],
) -> Iterator[tuple[Row, Answer]]:
    """Every row with its answer, in order, several asked for at a time. one: asks for a row; the event ends waiting.

    After `budget` tokens no more is asked for; answers on disk count, so that every attempt stops at the same row, and
    up to `concurrency` answers on the way come on top. Raises Interrupted when `stop` became true, EndpointDown when
    the server does not answer after several tries, UserError when it refuses.
    """
    halt = threading.Event()
    waiting: deque[tuple[Row, Future[Answer]]] = deque()
    pool = ThreadPoolExecutor(concurrency)
    try:
        for row in rows:
            asked.rows += 1
            if asked.tokens >= budget:
                asked.left_out += 1
                continue
            waiting.append((row, pool.submit(one, row, halt)))
            if len(waiting) >= concurrency:
                yield from _next(waiting, asked, budget, stop)
        while waiting:
            yield from _next(waiting, asked, budget, stop)
    finally:
        halt.set()
        pool.shutdown(wait=False, cancel_futures=True)  # a server that is slow must not hold up whoever stops the job


def _next(
    waiting: deque[tuple[Row, Future[Answer]]], asked: Asked, budget: int, stop: Callable[[], bool]
) -> Iterator[tuple[Row, Answer]]:
    """Wait for the oldest answer; its row with it, unless the budget was spent before it."""
    row, future = waiting[0]
    while True:
        if stop():
            raise Interrupted("Stopped while another server was asked; its answers so far are kept.")
        try:
            answer = future.result(POLL)
            break
        except NotYet:
            continue
    waiting.popleft()
    if asked.tokens >= budget:
        asked.left_out += 1
        return
    asked.count(answer)
    yield row, answer


def prompt_of(row: Conversation) -> list[Call]:
    """The row's messages before its last answer, as they are sent. Raises DataError."""
    last = max((i for i, m in enumerate(row.messages) if m.role == "assistant"), default=-1)
    ends = last if last == len(row.messages) - 1 else len(row.messages)
    messages = [plain(m) for m in row.messages[:ends]]
    if row.tools or not messages or messages[-1]["role"] not in ("user", "tool"):
        what = "has tools, which a teacher is not given" if row.tools else "has no user message before its answer"
        problem = Problem(row.source, f"{what}; this row cannot be asked for.", "messages")
        raise DataError(str(problem), problems=[problem])
    return messages
