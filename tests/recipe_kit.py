"""What the tests of recipes share: recipes made in this process, and models under `ft:` names without a job."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import tiny
from tunewright.core.durable import write_json
from tunewright.core.home import Home
from tunewright.core.recipe import parse_recipe_spec
from tunewright.core.run import ARTEFACT, JobFile, Run, read_artefact
from tunewright.core.spec import parse_spec
from tunewright.jobs import recipes
from tunewright.jobs.recipes import create_recipe, sources_of

ENCODER = "tiny-encoder"
ANIMALS = {
    "cats.md": "# Cats\n\nA cat sleeps most of the day.\n\nIt hunts mice at night.",
    "dogs.txt": "A dog barks at strangers and likes long walks.",
}


def finish_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do in this process what needs torch: starting another one takes seconds."""
    from tunewright.engine.finish_recipe import finish

    monkeypatch.setattr(recipes, "_finish", lambda home, folder, online: finish(folder, home))


def make(home: Home, recipe: dict[str, Any] | str, model: str, data: Sequence[Path] = (), **fields: Any) -> Path:
    """The folder of a new recipe."""
    spec = parse_recipe_spec({"recipe": recipe, "model": model, **fields})
    return create_recipe(home, spec, sources_of([str(p) for p in data], Path.cwd()))


def name_of(folder: Path) -> str:
    return read_artefact(folder).name


def add_tuned(home: Home, folder: Path, name: str) -> str:
    """Give an artefact's folder an `ft:` name, as the result of a job."""
    run = Run(home.runs / f"ftjob-{name.rsplit(':', 1)[-1]}")
    run.folder.mkdir()
    folder.rename(run.result)
    record = read_artefact(run.result).model_copy(update={"name": name})
    write_json(run.result / ARTEFACT, record.model_dump(mode="json"))
    spec = parse_spec({"model": "tiny", "training_file": "t"})
    run.write_job(JobFile(id=run.id, created_at=time.time(), name=name, base="tiny", spec=spec, train="data/t"))
    return name


def add_encoder(home: Home) -> Path:
    """A tiny random BERT under the name ENCODER."""
    return tiny.build_reader(home.models / ENCODER, "bert")


def documents(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, text in ANIMALS.items():
        (folder / name).write_text(text)
    return folder
