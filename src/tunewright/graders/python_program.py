"""What runs inside the sandbox: the user's `grade(sample, item)`, called once for each line that comes in.

Read as a text and given to `python -I -c`, so it imports the standard library only. Lines in: first {"source",
"limits"}, then {"sample", "item"}. Lines out: {"reward"}, or {"error"} with the end of the traceback.
"""

from __future__ import annotations

import json
import linecache
import math
import os
import resource
import time
import traceback
from collections.abc import Callable
from typing import Any

NAME = "grader.py"
MOST_CHARACTERS = 4000


def limit(limits: dict[str, int]) -> None:
    """limits: bytes of memory (address space), processes, bytes of a file, open files, seconds of one grade."""
    for which, name in (("AS", "memory"), ("NPROC", "processes"), ("FSIZE", "file"), ("NOFILE", "files")):
        resource.setrlimit(getattr(resource, f"RLIMIT_{which}"), (limits[name], limits[name]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def describe(error: BaseException) -> str:
    """The traceback from the user's first line on."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != NAME:
        trace = trace.tb_next
    text = "".join(traceback.format_exception(type(error), error, trace))
    return text[-MOST_CHARACTERS:].strip()


def load(source: str) -> Callable[..., Any]:
    linecache.cache[NAME] = (len(source), None, source.splitlines(keepends=True), NAME)
    scope: dict[str, Any] = {"__name__": "grader"}
    exec(compile(source, NAME, "exec"), scope)
    return scope["grade"]


def number(value: Any) -> float:
    if value is None or isinstance(value, str | bytes):
        raise TypeError(f"grade() returned {value!r:.80}; it must return a number")
    reward = float(value)
    if not math.isfinite(reward):
        raise ValueError(f"grade() returned {reward}; it must return a finite number")
    return reward


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the user's code gives, whatever it raises: an end by sys.exit is an error of it, too."""
    try:
        return work()
    except BaseException as e:  # noqa: BLE001 whatever the user's code raises is the answer
        return {"error": describe(e)}


def main() -> None:
    told, say = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)  # what the grader prints goes nowhere
    begin = json.loads(told.readline())
    limit(begin["limits"])
    found: dict[str, Any] = {}

    def start() -> dict[str, Any]:
        found["grade"] = load(begin["source"])
        return {"ready": True}

    def reply(answer: dict[str, Any]) -> None:
        say.write(json.dumps(answer) + "\n")
        say.flush()

    reply(attempt(start))
    for line in told:
        row = json.loads(line)
        second = int(time.process_time()) + begin["limits"]["seconds"] + 1
        resource.setrlimit(resource.RLIMIT_CPU, (second, resource.RLIM_INFINITY))
        reply(attempt(lambda row=row: {"reward": number(found["grade"](row["sample"], row["item"]))}))


main()
