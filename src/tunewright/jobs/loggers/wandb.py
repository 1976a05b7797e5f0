"""Weights & Biases: one run a job, with the job's id; without an API key it is written offline, for `wandb sync`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from tunewright.core.run import Run
from tunewright.jobs.loggers.base import Point, parameters

PROJECT = "tunewright"
# nothing of this process is worth recording: it only reads
QUIET: dict[str, Any] = {"silent": True, "console": "off", "x_disable_stats": True, "disable_git": True}


class WandB:
    """Offline, the job's folder is written anew each time. Online, W&B keeps what it has; later steps are added."""

    needs: ClassVar[str] = "wandb"

    def __init__(self, run: Run, folder: Path) -> None:
        import wandb

        self.run, self.folder = run, folder
        self.mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
        self._open: Any = None

    def begin(self, points: Sequence[Point]) -> int:
        import wandb

        self.close(None)
        if self.mode == "offline":
            for old in (self.folder / "wandb").glob(f"offline-run-*-{self.run.id}"):
                shutil.rmtree(old)
        self._open = wandb.init(
            id=self.run.id,
            name=self.run.job().name,
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=self.folder,
            mode=self.mode,  # type: ignore[arg-type]
            resume="allow" if self.mode == "online" else None,
            config=parameters(self.run),
            settings=wandb.Settings(**QUIET),
        )
        return sum(p.step < self._open.step for p in points) if self.mode == "online" else 0

    def write(self, points: Sequence[Point]) -> None:
        for p in points:
            self._open.log({**p.values, "_timestamp": p.time}, step=p.step)

    def close(self, status: str | None) -> None:
        if self._open is not None:
            self._open.finish(exit_code=0 if status in ("succeeded", None) else 1)
            self._open = None

    def where(self) -> str:
        if self.mode == "online":
            return f"run {self.run.id} at Weights & Biases"
        return f"{self.folder / 'wandb'} (offline); upload it with: wandb sync {self.folder}/wandb/offline-run-*"
