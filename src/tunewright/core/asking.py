"""One question to another server (a teacher, a judge): patiently, and kept on disk as soon as the answer is there.

The kept answers make asking resumable: what was answered once is read, not paid again, by this job or another one.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tunewright.core.durable import read_json, write_json
from tunewright.core.errors import EndpointDown, UserError
from tunewright.core.outbound import Endpoint, Reply, post_json

BACK_OFF = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds before each further try
MOST_SECONDS = 60.0  # that a server may ask to wait
LATER = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # answers of a server that is only busy
CUT_OFF = "an answer was cut off at max_tokens"

Post = Callable[[Endpoint, str, Any, float], Reply]
Call = dict[str, Any]


class Refused(UserError):
    """The server answered that it will not. answered: its HTTP status."""

    def __init__(self, message: str, answered: int, param: str) -> None:
        super().__init__(message, param=param)
        self.answered = answered


@dataclass(frozen=True)
class Teacher:
    """Whom to ask, and how. options: further fields of the request. timeout: seconds for each wait on the network.
    cache: the folder of kept answers; None keeps none. param: what names it in a job, for errors."""

    endpoint: Endpoint
    model: str
    cache: Path | None
    system: str = ""
    options: Call = field(default_factory=dict)
    timeout: float = 180.0
    back_off: tuple[float, ...] = BACK_OFF
    post: Post = post_json
    param: str = "objective"

    def request(self, messages: list[Call]) -> Call:
        told = [{"role": "system", "content": self.system}, *messages] if self.system else messages
        return {"model": self.model, "messages": told, **self.options}


@dataclass(frozen=True)
class Answer:
    """text: '' if there is none that could be learned; why says so then. tokens: read and written, as the server
    counted them. usage: its counts one by one. refusal: its own words for not answering. kept: it was on disk."""

    text: str
    tokens: int
    why: str = ""
    usage: dict[str, int] = field(default_factory=dict)
    refusal: str = ""
    kept: bool = False


def ask(teacher: Teacher, messages: list[Call], halt: threading.Event) -> Answer:
    """The answer to one prompt, from disk or from the server. Raises EndpointDown, Refused."""
    body = teacher.request(messages)
    path = None if teacher.cache is None else _place(teacher.cache, teacher.endpoint.url, body)
    if path is not None and path.is_file():
        return replace(Answer(**read_json(path)), kept=True)
    answer = read_answer(_patiently(teacher, body, halt))
    # anything else may be a server's bad moment
    if path is not None and (answer.text or answer.why == CUT_OFF):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(path, {name: value for name, value in asdict(answer).items() if name != "kept"})
    return answer


def _place(cache: Path, url: str, body: Call) -> Path:
    """Where the answer to a request is kept."""
    told = json.dumps([url, body], sort_keys=True, ensure_ascii=False)
    digest = hashlib.sha256(told.encode()).hexdigest()
    return cache / digest[:2] / f"{digest}.json"


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
                text = f"{trouble}. Check the endpoint, its key and the model's name."
                raise Refused(text, reply.status, teacher.param)
        if wait is None:
            tried = f"(tried {len(teacher.back_off) + 1} times)"
            raise EndpointDown(f"{trouble.rstrip('.')} {tried}. Its answers so far are kept; resume the job later.")
        halt.wait(max(wait, min((reply and reply.retry_after) or 0.0, MOST_SECONDS)))
        if halt.is_set():
            break
    raise EndpointDown(f"{url} was not asked to the end.")


def read_answer(reply: Reply) -> Answer:
    """What a chat completion says, with why it cannot be learned if so."""
    value = reply.value if isinstance(reply.value, dict) else {}
    usage = _counts(value.get("usage"))
    choices = value.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    text, refusal = message.get("content"), message.get("refusal")
    tokens = usage.get("total_tokens", len(str(text or "")) // 4 + 1)
    answer = Answer("", tokens, usage=usage, refusal=refusal if isinstance(refusal, str) else "")
    if not isinstance(text, str) or not text.strip():
        return replace(answer, why="the server's answer holds no text")
    if choice.get("finish_reason") == "length":
        return replace(answer, why=CUT_OFF)
    return replace(answer, text=text)


def _counts(usage: Any) -> dict[str, int]:
    """The numbers of tokens in a server's `usage`."""
    found = usage if isinstance(usage, dict) else {}
    return {k: n for k, n in found.items() if isinstance(n, int) and not isinstance(n, bool) and n >= 0}


def _said(reply: Reply) -> str:
    """The server's own words about an error, in short."""
    error = reply.value.get("error") if isinstance(reply.value, dict) else None
    text = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(text or "no reason given").split())[:300].rstrip(".")
