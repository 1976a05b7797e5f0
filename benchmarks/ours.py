"""What the benchmarks of tunewright alone share: the settings, jobs that run to their end, and one result file."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.process import Outcome, run_ours, temporary_home
from benchmarks.rivals.shared import Task
from benchmarks.settings import MODEL, RATES
from tunewright.core.home import Home, find_home


@dataclass(frozen=True)
class Place:
    """Where jobs run. home: a data folder of their own with the real one's models; work: for files."""

    model: str
    home: Home
    work: Path
    threads: int
    dtype: str

    def run(self, name: str, data: Path, tuner: str = "lora", **changes: Any) -> Outcome:
        """One job through the worker; its run folder is removed, its facts are kept."""
        options = {"out": str(self.work / name), "model": self.model, "data": str(data), "tuner": tuner,
                   "threads": self.threads, "dtype": self.dtype, "lr": RATES[tuner]}  # fmt: skip
        outcome = run_ours(Task(**{**options, **changes}), self.model, self.home, limit_s=3600.0)
        shutil.rmtree(outcome.facts["run"], ignore_errors=True)
        return outcome


def own_parser(description: str | None) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=MODEL, help="a name of the catalogue or a folder (default: %(default)s)")
    p.add_argument("--threads", type=int, default=None, help="CPU threads (all cores)")
    p.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of the products")
    p.add_argument("--json", default=None, metavar="FILE", help="write the result there; - prints it")
    return p


@contextmanager
def placed(args: argparse.Namespace) -> Iterator[Place]:
    """A place for jobs, for the time of the block; the model is brought into the real data folder first."""
    import os

    from tunewright.models.loader import materialise

    real = find_home().ensure()
    materialise(args.model, real)
    with TemporaryDirectory(prefix="tunewright-bench-") as folder:
        work = Path(folder)
        threads = args.threads or len(os.sched_getaffinity(0))
        yield Place(args.model, temporary_home(real, work / "home"), work, threads, args.dtype)
