"""TensorBoard: one event file a job, written anew from the run's events each time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from tunewright.core.run import Run
from tunewright.jobs.loggers.base import Point, parameters


class TensorBoard:
    """Each job has a folder of its own, so that TensorBoard shows the jobs side by side."""

    needs: ClassVar[str] = "tensorboard"

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder = run, folder / run.id
        self._writer: Any = None

    def begin(self, points: Sequence[Point]) -> int:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._writer is not None:
            self._writer.close()
        for old in self.folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = EventFileWriter(str(self.folder))
        self._text("job", json.dumps(parameters(self.run), indent=2, ensure_ascii=False))
        return 0

    def write(self, points: Sequence[Point]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for p in points:
            values = [Summary.Value(tag=_tag(k), simple_value=v) for k, v in p.values.items()]
            self._writer.add_event(Event(step=p.step, wall_time=p.time, summary=Summary(value=values)))
        self._writer.flush()

    def close(self, status: str | None) -> None:
        if self._writer is not None:
            self._writer.close()

    def where(self) -> str:
        return f"{self.folder}; look at it with: tensorboard --logdir {self.folder.parent}"

    def _text(self, tag: str, text: str) -> None:
        """A text for the TEXT tab, as Markdown code."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING
        from tensorboard.plugins.text.metadata import create_summary_metadata

        markdown = "\n".join(f"    {line}" for line in text.splitlines())
        value = Summary.Value(
            tag=tag,
            metadata=create_summary_metadata(display_name=tag, description=""),
            tensor=TensorProto(dtype=DT_STRING, string_val=[markdown.encode()]),
        )
        self._writer.add_event(Event(wall_time=self.run.job().created_at, summary=Summary(value=[value])))


def _tag(name: str) -> str:
    """Validation apart from training, as TensorBoard groups by the word before the slash."""
    return f"validation/{name}" if "valid" in name else f"training/{name}"
