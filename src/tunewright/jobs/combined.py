"""A model made of trained adapters without training: a run folder like any other, so that it is found and served."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunewright.core.durable import commit_folder, write_json
from tunewright.core.errors import SpecError
from tunewright.core.events import EventWriter
from tunewright.core.home import Home
from tunewright.core.ids import ModelName, new_id, parse_model_name, random_part
from tunewright.core.run import ARTEFACT, Run, find_artefact, read_artefact
from tunewright.data.tokenizer import TOKENIZER_FILES
from tunewright.jobs.launchers.local import worker_env
from tunewright.jobs.prepare import Origin, copy_tree, find_origin

COMMAND = (sys.executable, "-m", "tunewright.train.combine")


def combine_models(home: Home, names: Sequence[str], suffix: str = "", **options: Any) -> Run:
    """Combine the adapters of `ft:` models (or checkpoints) of one base; the run whose result is the new model.

    options: how, weights, rank, density and seed, as tuners/combine.py has them.
    Raises ModelNotFound, SpecError (with everything that is in the way), CheckpointError, DiskFull.
    """
    base = next((name for name in names if parse_model_name(name) is None), None)
    if base is not None:
        text = f"'{base}' is no tuned model. Name models whose names begin with `ft:`; `tunewright models` lists them."
        raise SpecError(text, param="model")
    folders = [find_artefact(home, name) for name in names]
    origins = [find_origin(name, home) for name in names]
    _check(names, folders, origins)
    parent = Run(next(p for p in folders[0].parents if (p / "job.json").is_file()))
    run = Run(home.runs / new_id("ftjob-"))
    try:
        _make(home, run, parent, names, folders, origins[0], suffix, options)
    except BaseException:
        shutil.rmtree(run.folder, ignore_errors=True)
        raise
    return run


def _check(names: Sequence[str], folders: Sequence[Path], origins: Sequence[Origin]) -> None:
    kinds = {name: read_artefact(folder).kind for name, folder in zip(names, folders, strict=True)}
    wrong = [f"'{name}' is of kind {kind}, not an adapter" for name, kind in kinds.items() if kind != "adapter"]
    bases = sorted({o.base for o in origins})
    if len(bases) > 1:
        wrong.append(f"they are over different bases: {', '.join(bases)}")
    if wrong:
        raise SpecError(f"These models cannot be combined: {'; '.join(wrong)}.", param="model")


def _make(
    home: Home,
    run: Run,
    parent: Run,
    names: Sequence[str],
    folders: Sequence[Path],
    origin: Origin,
    suffix: str,
    options: dict[str, Any],
) -> None:
    """Fill the run folder: data of the first source, the result, one attempt that succeeded, and job.json."""
    record, job, first = read_artefact(folders[0]), parent.job(), parse_model_name(names[0])
    name = str(ModelName(origin.short, first.org if first else "personal", suffix, random_part(8)))
    run.folder.mkdir(mode=0o700)
    copy_tree(parent.folder / "data", run.folder / "data")
    if origin.private_base is not None:
        copy_tree(origin.private_base, run.folder / "base")
    base = origin.base if origin.private_base is None else str(run.folder / "base")

    def fill(folder: Path) -> None:
        asked = {"base": base, "sources": [str(f) for f in folders], "target": str(folder), **options}
        done = subprocess.run(
            [*COMMAND, json.dumps(asked)], capture_output=True, text=True, env=worker_env(home), check=False
        )
        if done.returncode:
            raise SpecError((done.stderr.strip().splitlines() or ["Combining failed without a message."])[-1])
        for path in (folders[0] / file for file in TOKENIZER_FILES):
            if path.exists():
                shutil.copyfile(path, folder / path.name)
        tuner = {"name": "combined", "sources": list(names), **options}
        made = record.model_copy(update={"name": name, "base": base, "tuner": tuner, "step": 0, "metrics": {}})
        write_json(folder / ARTEFACT, made.model_dump(mode="json"))

    commit_folder(run.result, fill, {"step": 0})
    events = EventWriter(run.attempt(1) / "events.jsonl", 1)
    events.write("message", f"New model created from {', '.join(names)}: {name}", {"step": 0})
    events.write("end", "The models have been combined", {"status": "succeeded", "trained_tokens": 0, "steps": 0})
    events.close()
    spec = job.spec.model_copy(update={"suffix": suffix or None})
    made = {"id": run.id, "created_at": time.time(), "name": name, "base": base, "spec": spec, "start": None}
    run.write_job(job.model_copy(update=made))
