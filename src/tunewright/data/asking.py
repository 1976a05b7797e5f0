"""Prompts to another server's answers: in order, several at a time, each kept on disk as soon as it is there.

The kept answers make asking resumable: what was answered once is read, not paid again, by this job or another one.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tunewright.core.conversation import Conversation
from tunewright.core.durable import read_json, write_json
from tunewright.core.errors import DataError, EndpointDown, Interrupted, Problem, UserError
from tunewright.core.outbound import Endpoint, Reply, post_json
from tunewright.data.spans import plain

BACK_OFF = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds before each further try
MOST_SECONDS = 60.0  # that a server may ask to wait
LATER = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # answers of a server that is only busy
POLL = 0.2
CUT_OFF = "an answer was cut off at max_tokens"

Post = Callable[[Endpoint, str, Any, float], Reply]
Call = dict[str, Any]
Row = TypeVar("Row")


@dataclass(frozen=True)
class Teacher:
    """Whom to ask, and how. options: further fields of the request. timeout: seconds for each wait on the network.
    cache: the folder of kept answers."""

    endpoint: Endpoint
    model: str
    cache: Path
    system: str = ""
    options: Call = field(default_factory=dict)
    timeout: float = 180.0
    back_off: tuple[float, ...] = BACK_OFF
    post: Post = post_json

    def request(self, messages: list[Call]) -> Call:
        told = [{"role": "system", "content": self.system}, *messages] if self.system else messages
        return {"model": self.model, "messages": told, **self.options}


@dataclass(frozen=True)
class Answer:
    """text: '' if there is none that could be learned; why says so then. tokens: read and written, as the server
    counted them. kept: it was on disk already."""

    text: str
    tokens: int
    why: str = ""
    kept: bool = False


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


def ask(teacher: Teacher, messages: list[Call], halt: threading.Event) -> Answer:
    """The answer to one prompt, from disk or from the server. Raises EndpointDown, UserError."""
    body = teacher.request(messages)
    told = json.dumps([teacher.endpoint.url, body], sort_keys=True, ensure_ascii=False)
    digest = hashlib.sha256(told.encode()).hexdigest()
    path = teacher.cache / digest[:2] / f"{digest}.json"
    if path.is_file():
        return Answer(**read_json(path), kept=True)
    answer = read_answer(_patiently(teacher, body, halt))
    if answer.text or answer.why == CUT_OFF:  # anything else may be a server's bad moment
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(path, {"text": answer.text, "tokens": answer.tokens, "why": answer.why})
    return answer


def _patiently(teacher: Teacher, body: Call, halt: threading.Event) -> Reply:
    """The server's answer, asked for again, ever more slowly, as long as it is only busy or away."""
    url = teacher.endpoint.url
    for wait in (*teacher.back_off, None):
        try:
            reply = teacher.post(teacher.endpoint, "/chat/completions", body, teacher.timeout)
        except EndpointDown as e:
            reply, trouble = None, e.message
        else:
            if reply.status == 200:
                return reply
            trouble = f"{url} answered {reply.status}: {_said(reply)}"
            if reply.status not in LATER:
                raise UserError(f"{trouble}. Check the endpoint, its key and the model's name.", param="objective")
        if wait is None:
            tries = len(teacher.back_off) + 1
            raise EndpointDown(f"{trouble} (tried {tries} times). Its answers so far are kept; resume the job later.")
        halt.wait(max(wait, min((reply and reply.retry_after) or 0.0, MOST_SECONDS)))
        if halt.is_set():
            break
    raise EndpointDown(f"{url} was not asked to the end.")


def read_answer(reply: Reply) -> Answer:
    """What a chat completion says, with why it cannot be learned if so."""
    value = reply.value if isinstance(reply.value, dict) else {}
    usage = value.get("usage")
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    choices = value.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    known = tokens if isinstance(tokens, int) and tokens >= 0 else len(str(text or "")) // 4 + 1
    if not isinstance(text, str) or not text.strip():
        return Answer("", known, "the server's answer holds no text")
    if choice.get("finish_reason") == "length":
        return Answer("", known, CUT_OFF)
    return Answer(text, known)


def _said(reply: Reply) -> str:
    """The server's own words about an error, in short."""
    error = reply.value.get("error") if isinstance(reply.value, dict) else None
    text = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(text or "no reason given").split())[:300].rstrip(".")
