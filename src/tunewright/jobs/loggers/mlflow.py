"""MLflow: one run a job in the experiment `tunewright`, in a local database or wherever MLFLOW_TRACKING_URI says."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from tunewright.core.run import Run
from tunewright.jobs.loggers.base import Point, parameters

EXPERIMENT = "tunewright"
TAG = "tunewright.job"
STATUS = {"succeeded": "FINISHED", "failed": "FAILED", "interrupted": "KILLED", "paused": "KILLED", None: "RUNNING"}
AT_ONCE = {"metrics": 1000, "params": 100}  # MLflow takes no more in one request


class MLflow:
    """The run is found again by its tag, so that another call goes on where the last one ended."""

    needs: ClassVar[str] = "mlflow"

    def __init__(self, run: Run, folder: Path) -> None:
        from mlflow.tracking import MlflowClient

        self.run = run
        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.absolute() / 'mlflow.db'}"
        self.client = MlflowClient(self.uri)
        found = self.client.get_experiment_by_name(EXPERIMENT)
        artifacts = None if "MLFLOW_TRACKING_URI" in os.environ else (folder.absolute() / "artifacts").as_uri()
        self.experiment = found.experiment_id if found else self.client.create_experiment(EXPERIMENT, artifacts)
        self.id = ""

    def begin(self, points: Sequence[Point]) -> int:
        found = self.client.search_runs([self.experiment], f"tags.`{TAG}` = '{self.run.id}'")
        if found:
            self.id = found[0].info.run_id
            history = self.client.get_metric_history(self.id, "tokens_per_second")
            there = sorted((m.step, m.value) for m in history)
            if len(there) <= len(points) and all(_same(a, p.mark) for a, p in zip(there, points, strict=False)):
                return len(there)
            self.client.delete_run(self.id)
        self._create()
        return 0

    def _create(self) -> None:
        from mlflow.entities import Param

        job = self.run.job()
        made = self.client.create_run(
            self.experiment, int(job.created_at * 1000), {TAG: self.run.id}, run_name=job.name
        )
        self.id = made.info.run_id
        params = [Param(k, str(v)[:500]) for k, v in parameters(self.run).items()]
        self._send("params", params)

    def write(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        self._send("metrics", [Metric(k, v, int(p.time * 1000), p.step) for p in points for k, v in p.values.items()])

    def close(self, status: str | None) -> None:
        if self.id:
            self.client.update_run(self.id, STATUS.get(status, "FAILED"))

    def where(self) -> str:
        return f"{self.uri}; look at it with: mlflow ui --backend-store-uri {self.uri}"

    def _send(self, kind: str, items: Sequence[Any]) -> None:
        size = AT_ONCE[kind]
        for at in range(0, len(items), size):
            some: dict[str, Any] = {kind: items[at : at + size]}
            self.client.log_batch(self.id, **some)


def _same(a: tuple[int, float], b: tuple[int, float]) -> bool:
    return a[0] == b[0] and math.isclose(a[1], b[1], rel_tol=1e-9)
