"""python: the user's own `def grade(sample, item) -> float`, in a sandbox."""

from __future__ import annotations

import ast
import math
import os
import threading
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tunewright.graders.base import Grade, GraderOptions, Seams, failed
from tunewright.graders.sandbox import Ended, NoSandbox, Sandbox, choose_mode
from tunewright.graders.templates import Scope, Template

MOST_SOURCE = 256 << 10  # bytes
MOST_SECONDS = 120.0
MOST_PROCESSES = 4


class Limits(BaseModel):
    """Ours. timeout: seconds of one grade."""

    model_config = ConfigDict(extra="forbid", strict=True)
    timeout: float = Field(default=MOST_SECONDS, gt=0, le=MOST_SECONDS)


class Python:
    """reward: what `grade(sample, item)` of `source` returns, any finite number.

    A process grades one sample after the other, so globals of the source live on; after an error it is a fresh one.
    `image_tag` is accepted and has no effect: graders find the packages of this installation.
    """

    class Options(GraderOptions):
        type: Literal["python"]
        source: str
        image_tag: str | None = None
        tunewright: Limits = Field(default_factory=Limits)

        @field_validator("source")
        @classmethod
        def _has_grade(cls, source: str) -> str:
            if len(source.encode(errors="replace")) > MOST_SOURCE:
                raise ValueError(f"it is larger than {MOST_SOURCE >> 10} KiB")
            try:
                tree = ast.parse(source)
            except SyntaxError as e:
                raise ValueError(f"line {e.lineno}: {e.msg}") from e
            except (ValueError, RecursionError, MemoryError) as e:
                raise ValueError("it cannot be read as Python") from e
            if "grade" not in {name for node in ast.walk(tree) for name in _names(node)}:
                raise ValueError("it has no function grade; write `def grade(sample, item):` that returns a number")
            return source

    templates: Sequence[Template] = ()

    def __init__(self, options: Python.Options, seams: Seams) -> None:
        self.options = options
        self.confined = choose_mode()
        self.slots = threading.BoundedSemaphore(min(MOST_PROCESSES, os.cpu_count() or 1))
        self.idle: list[Sandbox] = []
        self.lock = threading.Lock()
        self.closed = False

    def __call__(self, scope: Scope) -> Grade:
        row = {"sample": {"output_json": None, **scope["sample"]}, "item": scope["item"]}
        with self.slots:
            try:
                answer = self._answer(row)
            except NoSandbox as e:
                kind = "sandbox_unavailable"
                return failed(str(e), python_grader_server_error=True, python_grader_server_error_type=kind)
            except Ended as e:
                answer = {"error": str(e)}
        reward, error = answer.get("reward"), answer.get("error")
        if isinstance(reward, float) and math.isfinite(reward):
            return Grade(reward)
        why = str(error or "the process wrote something that is no answer")
        return failed(why, python_grader_runtime_error=True, python_grader_runtime_error_details=why)

    def _answer(self, row: dict[str, object]) -> dict[str, object]:
        """Of an idle process, or a new one; it is kept if all went well."""
        with self.lock:
            box = self.idle.pop() if self.idle else None
        if box is not None and not box.ready:
            box.close()
            box = None
        box = box or Sandbox(self.options.source, self.options.tunewright.timeout, self.confined)
        answer: dict[str, object] = {}
        try:
            answer = box.ask(row)
        finally:
            with self.lock:
                keep = "reward" in answer and not self.closed
                if keep:
                    self.idle.append(box)
            if not keep:
                box.close()
        return answer

    def close(self) -> None:
        """End the processes; one that is grading ends when it is done."""
        with self.lock:
            self.closed, boxes, self.idle = True, self.idle, []
        for box in boxes:
            box.close()


def _names(node: ast.AST) -> list[str]:
    """What a statement gives a name to, as far as it is plain."""
    if isinstance(node, ast.FunctionDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [t.id for t in node.targets if isinstance(t, ast.Name)]
    return [a.asname or a.name for a in node.names] if isinstance(node, ast.ImportFrom) else []
