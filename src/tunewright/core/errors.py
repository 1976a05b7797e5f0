"""The error tree: one class a kind of failure, with its HTTP status, OpenAI type and code, and the worker's exit code.

A message says what happened, the value, what is allowed, the nearest match and what to do. It never holds a path of
the server, a stack trace or a secret. Surfaces (CLI, API, worker) print `message` and nothing else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


class TunewrightError(Exception):
    """Base of every error that a user may see."""

    status = 500
    type = "server_error"
    code: str | None = None
    exit_code = 70

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code if code is not None else type(self).code
        self.param = param

    def to_openai(self) -> dict[str, Any]:
        """The `error` object of OpenAI's API: {message, type, param, code}."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}


class UserError(TunewrightError):
    """The request or the input is wrong; trying again unchanged will not help."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"
    exit_code = 65


class SpecError(UserError):
    """A job spec (or one of its option blocks) is not valid."""

    exit_code = 64


class AuthError(UserError):
    status = 401
    code = "invalid_api_key"


class Forbidden(UserError):
    status = 403
    type = "permission_error"
    code = "forbidden"


class NotFound(UserError):
    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    """A model name that nothing here answers to."""

    code = "model_not_found"


class StateError(UserError):
    """The thing is in a state that does not allow this (400, never 409: the SDK retries 409)."""

    code = "invalid_state"


class Busy(TunewrightError):
    """A port, a folder or a lock is held by another process."""

    status = 503
    code = "busy"
    exit_code = 69


class CheckpointError(TunewrightError):
    """A checkpoint is damaged or does not belong to this job."""

    code = "checkpoint_damaged"
    exit_code = 74


class DiskFull(TunewrightError):
    """No space left; the job pauses and nothing is lost."""

    code = "disk_full"
    exit_code = 73


class EndpointDown(TunewrightError):
    """A server that the job asks (a teacher, a judge) does not answer; the job pauses and nothing is lost."""

    status = 503
    code = "endpoint_unavailable"
    exit_code = 76


class OutOfMemory(TunewrightError):
    code = "out_of_memory"
    exit_code = 71


class Diverged(TunewrightError):
    """Loss or gradient became NaN or infinite and a roll-back did not help."""

    code = "diverged"
    exit_code = 72


class RollBack(Diverged):
    """The loop must go back to an earlier checkpoint; which one is in plan.json. Caught in train/run.py."""


class Interrupted(TunewrightError):
    """Stopped by a signal after a checkpoint was written; a later attempt continues."""

    code = "interrupted"
    exit_code = 75


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a data file.

    line: 1-based line (JSONL), row (CSV, Parquet) or element (JSON array). field: path such as `messages[2].role`.
    """

    line: int
    message: str
    field: str = ""
    value: str = ""
    allowed: str = ""
    code: str = "invalid_training_file"

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}"


@dataclass
class DataReport:
    """What validation found, in full: at most `limit` problems are kept, `n_problems` counts all of them.

    name: the file's name as the user knows it.
    """

    n_rows: int = 0
    n_problems: int = 0
    problems: list[Problem] = field(default_factory=list)
    format: str = ""
    shape: str = ""
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    name: str = ""


class DataError(UserError):
    """A data file is not usable. `problems` has up to 100 of them."""

    code = "invalid_training_file"

    def __init__(
        self, message: str, *, problems: Iterable[Problem] = (), code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message, code=code, param=param)
        self.problems = list(problems)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch's CPU allocator or CUDA could not get memory."""
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and ("can't allocate memory" in text or "out of memory" in text or type(error).__name__ == "OutOfMemoryError")
    )


def nearest(value: str, allowed: Iterable[str]) -> str | None:
    """The allowed word nearest to `value`, or None when none is near."""
    words = list(allowed)
    folded = {w.lower(): w for w in words}
    hits = difflib.get_close_matches(str(value).lower(), list(folded), n=1, cutoff=0.6)
    return folded[hits[0]] if hits else None


def did_you_mean(value: str, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or the empty string when nothing is near."""
    near = nearest(value, allowed)
    return f" Did you mean '{near}'?" if near else ""
