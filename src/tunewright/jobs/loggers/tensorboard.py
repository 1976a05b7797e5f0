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
        for p in points:
            values = [{"tag": _tag(k), "simple_value": v} for k, v in p.values.items()]
            self._add({"step": p.step, "wall_time": p.time, "summary": {"value": values}})
        self._writer.flush()

    def close(self, status: str | None) -> None:
        if self._writer is not None:
            self._writer.close()

    def where(self) -> str:
        return f"{self.folder}; look at it with: tensorboard --logdir {self.folder.parent}"

    def _text(self, tag: str, text: str) -> None:
        """A text for the TEXT tab, as Markdown code."""
        from tensorboard.plugins.text.metadata import create_summary_metadata

        markdown = "\n".join(f"    {line}" for line in text.splitlines())
        value = {
            "tag": tag,
            "metadata": create_summary_metadata(display_name=tag, description=""),
            "tensor": {"dtype": "DT_STRING", "string_val": [markdown.encode()]},
        }
        self._add({"wall_time": self.run.job().created_at, "summary": {"value": [value]}})

    def _add(self, event: dict[str, Any]) -> None:
        """event: the fields of TensorBoard's Event message."""
        from tensorboard.compat.proto import event_pb2

        messages: Any = event_pb2  # made when it is imported, so no type checker knows what is in it
        self._writer.add_event(messages.Event(**event))


def _tag(name: str) -> str:
    """Validation apart from training, as TensorBoard groups by the word before the slash."""
    return f"validation/{name}" if "valid" in name else f"training/{name}"
