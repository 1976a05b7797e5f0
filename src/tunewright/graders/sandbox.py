"""A process that runs somebody's Python: started by confine.py, asked a line, answers a line, killed with all it began.

TUNEWRIGHT_PYTHON_GRADERS says where that may be: `confined` (the default) only in namespaces of its own, `limited` also
where this machine has none, with nothing but limits on memory and time, `off` never.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from tunewright.core.errors import Forbidden, UserError

VARIABLE = "TUNEWRIGHT_PYTHON_GRADERS"
MODES = ("confined", "limited", "off")
HERE = Path(__file__).parent
CONFINE = HERE / "confine.py"
PROGRAM = HERE / "python_program.py"
MOST_ANSWER = 64 << 10  # bytes
SCRATCH = 256 << 20  # bytes that a confined grader may write to /tmp
START_SECONDS = 60.0
LIMITS = {"memory": 2 << 30, "processes": 64, "file": 64 << 20, "files": 128}
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class Ended(Exception):
    """The process gave no answer: it ended, took too long, or answered what is none. It is of no more use."""


class NoSandbox(Exception):
    """The process could not be confined, or not started."""


class Sandbox:
    """One process, with its source loaded. Not for several threads at once. confined: in namespaces of its own.

    Raises NoSandbox; Ended with the traceback if the source cannot be loaded.
    """

    def __init__(self, source: str, seconds: float, confined: bool = True) -> None:
        self.seconds = seconds
        self._folder = tempfile.mkdtemp(prefix="tunewright-grader-")
        life, self._life = os.pipe()
        try:
            self._process = _start(self._folder, life, confined)
        except OSError as e:
            os.close(self._life)
            shutil.rmtree(self._folder, ignore_errors=True)
            raise NoSandbox(f"the sandbox could not be started: {e.strerror}") from e
        finally:
            os.close(life)
        try:
            begun = {"source": source, "limits": {**LIMITS, "seconds": int(seconds) + 1}}
            answer = self._exchange(begun, START_SECONDS)
            if "cannot" in answer:
                raise NoSandbox(str(answer["cannot"])[:500])
            if "ready" not in answer:
                raise Ended(str(answer.get("error", "it said nothing")))
        except BaseException:
            self.close()
            raise

    def ask(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """{"reward"} or {"error"} for {"sample", "item"}. Raises Ended."""
        return self._exchange(row, self.seconds)

    @property
    def ready(self) -> bool:
        """Whether it waits for a line: it has not ended, nor said something that nobody asked for."""
        assert self._process.stdout is not None
        told = select.poll()
        told.register(self._process.stdout, select.POLLIN)
        return not told.poll(0)

    def close(self) -> None:
        """Kill the process and everything it began."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        os.close(self._life)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _exchange(self, line: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Send a line and wait for one. Raises Ended."""
        told = json.dumps(line, default=str).encode() + b"\n"
        data = self._talk(told, time.monotonic() + seconds, seconds)
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError) as e:
            raise Ended("the process wrote something that is no answer") from e
        if not isinstance(answer, dict):
            raise Ended("the process wrote something that is no answer")
        return answer

    def _talk(self, told: bytes, end: float, seconds: float) -> bytes:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        to, back = process.stdin.fileno(), process.stdout.fileno()
        left, data = memoryview(told), bytearray()
        ready = select.poll()
        ready.register(back, select.POLLIN)
        ready.register(to, select.POLLOUT)
        while not data.endswith(b"\n"):
            wait = end - time.monotonic()
            events = dict(ready.poll(max(wait, 0.0) * 1000))
            if not events and wait <= 0:
                raise Ended(f"it took more than {seconds:g} s and was killed")
            if to in events:
                left = left[_write(to, left) :]
                if not left:
                    ready.unregister(to)
            if back in events:
                part = os.read(back, 1 << 16)
                data += part
                if not part:
                    raise Ended(self._last_words())
                if len(data) > MOST_ANSWER:
                    raise Ended(f"it answered with more than {MOST_ANSWER >> 10} KiB")
        return bytes(data)

    def _last_words(self) -> str:
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "it closed its output before it answered"
        how = f"was killed by signal {code - 128}" if code > 128 else f"ended with exit status {code}"
        return f"its process {how} before grade() returned"


def _write(pipe: int, data: memoryview) -> int:
    """Bytes that are done with: those written, or all if nobody reads any more."""
    try:
        return os.write(pipe, data)
    except BrokenPipeError:
        return len(data)  # it has ended; what it said before is still to be read


def _start(folder: str, life: int, confined: bool) -> subprocess.Popen[bytes]:
    program = PROGRAM.read_text(encoding="utf-8")
    home = {} if confined else {"HOME": folder, "TMPDIR": folder}
    config = {
        "command": [sys.executable, "-I", "-B", "-c", program],
        "env": {**ENVIRONMENT, **home},
        "visible": visible(),
        "root": folder,
        "scratch": SCRATCH,
        "life": life,
        "confined": confined,
    }
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(CONFINE), json.dumps(config)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        cwd=folder,
        env={},
        start_new_session=True,
        pass_fds=(life,),
    )
    assert process.stdin is not None
    os.set_blocking(process.stdin.fileno(), False)
    return process


def visible() -> list[str]:
    """The folders of the interpreter and its packages, and of what its links lead to; shorter ones first."""
    found = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    found |= {sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")}
    python = sys.executable
    while os.path.islink(python):
        python = os.path.normpath(os.path.join(os.path.dirname(python), os.readlink(python)))
        found.add(os.path.dirname(os.path.dirname(python)))
    return sorted((p for p in found if p != "/"), key=len)


def choose_mode(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether graders are confined (True) or only limited (False) here. Raises Forbidden where they may not run."""
    mode = environ.get(VARIABLE, MODES[0])
    if mode not in MODES:
        raise UserError(f"{VARIABLE} is '{mode}'; use one of: {', '.join(MODES)}.")
    if mode == "off":
        raise Forbidden(
            f"Python graders are switched off on this machine ({VARIABLE}=off). Use string_check, text_similarity, "
            "score_model or multi.",
            code="python_grader_unavailable",
        )
    why = trouble()
    if why and mode != "limited":
        raise Forbidden(
            f"Python graders cannot be confined on this machine ({why}), so they are not run: they could read and "
            f"write whatever the server can. Whoever runs it may allow that with {VARIABLE}=limited; in a container, "
            "give it the right to make namespaces instead.",
            code="python_grader_unavailable",
        )
    return not why


@cache
def trouble() -> str:
    """Why nothing can be confined on this machine, or ''. It is tried once."""
    try:
        Sandbox("def grade(sample, item): return 0", START_SECONDS).close()
    except (NoSandbox, Ended) as e:
        return str(e)
    return ""
