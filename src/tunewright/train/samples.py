"""samples.jsonl: every answer that a job's model gave, with its grades, one line each. A step's lines are committed at
once, before the step trains on them, so a later attempt reads them instead of asking again.

A line: {"step", "place", "of", "role": "train" or "valid", "rollbacks", "row", "sample", "prompt", "text", "tokens",
"n_tokens", "finish": "stop" or "length", "reward", "grades", "errors", "why", "advantage"}. place, of: which of how
many lines of its block; a block that is not whole is no more than a crash left, and is cut off. Of several blocks of a
step the last counts: after a roll-back a step is done again with other weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tunewright.core.durable import disk_full_is_clear, fsync_path

NAME = "samples.jsonl"
Line = dict[str, Any]


class Samples:
    """The file of a run, open to be read and appended to. Only the holder of the run's lock may have one."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._blocks: dict[int, tuple[int, int]] = {}  # step -> offset and roll-backs of its last block in training
        with open(self.path, "ab") as f:
            whole = self._scan()
            f.truncate(whole)
            os.fsync(f.fileno())
        fsync_path(folder)

    def of_step(self, step: int, rollbacks: int) -> list[Line] | None:
        """The lines of a step of training, if it was sampled after this many roll-backs; else None."""
        offset, known = self._blocks.get(step, (0, -1))
        if known != rollbacks:
            return None
        with open(self.path, "rb") as f:
            f.seek(offset)
            first = json.loads(f.readline())
            return [first, *(json.loads(f.readline()) for _ in range(first["of"] - 1))]

    def append(self, lines: Sequence[Line]) -> None:
        """Add a block; when this returns it survives a power cut. Raises DiskFull, and then nothing was added."""
        numbered = [{**line, "place": i, "of": len(lines)} for i, line in enumerate(lines)]
        raw = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in numbered).encode()
        with disk_full_is_clear(NAME), open(self.path, "ab", buffering=0) as f:
            start = f.tell()
            try:
                if f.write(raw) != len(raw):
                    raise OSError(28, "No space left on device")
                os.fsync(f.fileno())
            except OSError:
                f.truncate(start)
                raise
        self._note(numbered[0], start)

    def _note(self, first: Line, offset: int) -> None:
        if first["role"] == "train":
            self._blocks[first["step"]] = (offset, first["rollbacks"])

    def _scan(self) -> int:
        """Find the blocks; returns where the last whole one ends."""
        end, start, first = 0, 0, None
        for offset, line in self._lines():
            if line["place"] == 0:
                start, first = offset[0], line
            if line["place"] == line["of"] - 1 and first is not None:
                self._note(first, start)
                end = offset[1]
        return end

    def _lines(self) -> Iterator[tuple[tuple[int, int], Line]]:
        """((where it begins, where it ends), line) up to the first one that is not whole."""
        at = 0
        with open(self.path, "rb") as f:
            for raw in f:
                try:
                    line = json.loads(raw) if raw.endswith(b"\n") else None
                except ValueError:
                    return
                if not isinstance(line, dict):
                    return
                yield (at, at + len(raw)), line
                at += len(raw)
