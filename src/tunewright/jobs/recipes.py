"""Models made without training: a folder under `recipes/` with what the engine needs to serve them, made whole."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunewright.core.durable import commit_folder, discard, write_json
from tunewright.core.errors import ModelNotFound, SpecError, did_you_mean
from tunewright.core.home import Home
from tunewright.core.ids import ModelName, parse_model_name, random_part
from tunewright.core.recipe import RecipeSpec
from tunewright.core.run import ARTEFACT, Artefact, find_artefact, list_recipes, list_runs, read_artefact
from tunewright.core.spec import Part
from tunewright.engine.recipes.base import Source, listed, make_recipe, other_models, recipe_of, write_rows
from tunewright.engine.recipes.passages import SUFFIXES
from tunewright.engine.request import DECODING, parse_request
from tunewright.jobs.launchers.local import worker_env
from tunewright.jobs.prepare import find_origin
from tunewright.jobs.rows import ModelRow
from tunewright.models.catalogue import resolve

COMMAND = (sys.executable, "-m", "tunewright.engine.finish_recipe")
KIND = "recipe"
MAX_DEPTH = 4
_WANTS = {
    "rows": "needs 'data': one file of chat rows, each a question and its answer",
    "documents": f"needs 'data': documents that end in {', '.join(SUFFIXES)}, or a folder of them",
}


def create_recipe(
    home: Home, spec: RecipeSpec, sources: Sequence[Source] = (), *, org: str = "personal", allow_paths: bool = True
) -> Path:
    """Make the model of a spec; returns its folder, whose artefact.json has its name.

    sources: the files of `spec.data`. allow_paths: whether a model's name may be a path (never over HTTP).
    Raises SpecError, DataError, ModelNotFound, DiskFull; then nothing was made.
    """
    below = model_name(home, spec.model, allow_paths)
    tuned = parse_model_name(below)
    short = tuned.base if tuned else find_origin(below, home).short
    name = ModelName(short, org, spec.suffix or "", random_part(8))
    return build_recipe(home, home.recipes / name.id, str(name), spec, sources, allow_paths=allow_paths)


def build_recipe(
    home: Home, folder: Path, name: str, spec: RecipeSpec, sources: Sequence[Source], *, allow_paths: bool = True
) -> Path:
    """create_recipe in a folder and with a name of the caller's choice."""
    recipe = make_recipe(spec.recipe)
    _check_sources(spec.recipe.name, recipe.card.data, sources)
    _check_decoding(spec.decoding)
    options = {**recipe.options.model_dump(mode="json"), **_named(home, recipe, allow_paths)}
    record = Artefact(
        kind=KIND,
        name=name,
        base=model_name(home, spec.model, allow_paths),
        tuner={},
        step=0,
        decoding=spec.decoding,
        recipe=Part(name=spec.recipe.name, options=options).model_dump(),
    )
    _check_models(home, record)
    rows = recipe.make_rows(sources) if recipe.card.data else None

    def fill(tmp: Path) -> None:
        write_json(tmp / ARTEFACT, record.model_dump(mode="json"))
        if rows is not None:
            write_rows(tmp, rows)
        if recipe.encoder is not None or recipe.card.does == "combine":
            _finish(home, tmp, _online(home, [str(record.base), *other_models(recipe), recipe.encoder]))

    return commit_folder(folder, fill, {"step": 0})


def model_name(home: Home, name: str, allow_paths: bool = True) -> str:
    """The name under which a recipe keeps a model: as it is, a path made absolute.

    Raises ModelNotFound with the nearest name, SpecError for a model that writes no text.
    """
    if parse_model_name(name) is None:
        info = resolve(name, home, allow_paths=allow_paths)
        if info.needs_network and not allow_paths:
            raise ModelNotFound(
                f"The model '{name}' is in the catalogue but not on this machine yet. Start a fine-tuning job on it, "
                "which downloads it.",
                param="model",
            )
        return info.location if info.kind in ("folder", "gguf") else info.name
    try:
        record = read_artefact(find_artefact(home, name))
    except ModelNotFound as e:
        raise ModelNotFound(f"{e.message}{did_you_mean(name, _known(home))}", param="model") from e
    if record.head != "lm":
        raise SpecError(f"The model '{name}' answers with a class or a value; a recipe needs one that writes text.")
    return name


def model_rows(home: Home) -> list[ModelRow]:
    """Every recipe as a row of the list of models, newest first."""
    return [_row(folder, read_artefact(folder)) for folder in reversed(list_recipes(home))]


def find_row(home: Home, name: str) -> ModelRow | None:
    wanted = parse_model_name(name)
    if wanted is None or not (home.recipes / wanted.id / ARTEFACT).is_file():
        return None
    record = read_artefact(home.recipes / wanted.id)
    return _row(home.recipes / wanted.id, record) if record.name == name else None


def remove(row: ModelRow) -> None:
    """Delete a recipe. What was made over it will say that it is gone."""
    discard(Path(row.folder))


def _row(folder: Path, record: Artefact) -> ModelRow:
    made = int((folder / ARTEFACT).stat().st_mtime)
    return ModelRow(record.name, made, str(folder), str(record.base), "", 0)


def _known(home: Home) -> list[str]:
    runs = [run.job().name for run in list_runs(home) if (run.result / ARTEFACT).is_file()]
    return [*runs, *(row.name for row in model_rows(home))]


def _check_sources(name: str, data: str, sources: Sequence[Source]) -> None:
    if data and not sources:
        raise SpecError(f"The recipe '{name}' {_WANTS[data]}.", param="data")
    if not data and sources:
        raise SpecError(f"The recipe '{name}' takes no data; leave 'data' out.", param="data")
    if data == "rows" and len(sources) > 1:
        raise SpecError(f"The recipe '{name}' takes one file; got {len(sources)}.", param="data")


def _check_decoding(decoding: dict[str, Any]) -> None:
    for key in decoding:
        if key not in DECODING:
            near = did_you_mean(key, DECODING)
            raise SpecError(f"decoding has no '{key}'.{near} It may have: {', '.join(DECODING)}.", param="decoding")
    parse_request({"base": "-", "prompt": "-", **decoding})


def _named(home: Home, recipe: Any, allow_paths: bool) -> dict[str, Any]:
    """The recipe's options that hold names of models, each name checked; its encoder too."""
    fields = [*recipe.card.models, *(["encoder"] if recipe.encoder is not None else [])]
    found: dict[str, Any] = {}
    for field in fields:
        value = getattr(recipe.options, field)
        names = [model_name(home, name, allow_paths) for name in listed(value)]
        found[field] = names[0] if isinstance(value, str) else names
    return found


def _check_models(home: Home, record: Artefact) -> None:
    """Raise SpecError for recipes that go round in a circle, stand too high upon each other, or have no logits."""
    recipe = recipe_of(record)
    _walk(home, record, (record.name,))
    if recipe.card.does == "combine":
        for name in (str(record.base), *other_models(recipe)):
            if (inner := _recipe(home, name)) is not None:
                raise SpecError(
                    f"'{name}' is a recipe ({(inner.recipe or {}).get('name')}); logits can be added of models only. "
                    f"Name the model below it, '{inner.base}'.",
                    param="recipe",
                )


def _walk(home: Home, record: Artefact, above: tuple[str, ...]) -> None:
    for name in (str(record.base), *other_models(recipe_of(record))):
        inner = _recipe(home, name)
        if name in above:
            circle = " -> ".join([*above[above.index(name) :], name])
            raise SpecError(f"These recipes go round in a circle: {circle}.", param="model")
        if inner is not None and len(above) >= MAX_DEPTH:
            raise SpecError(f"At most {MAX_DEPTH} recipes may stand upon each other.", param="model")
        if inner is not None:
            _walk(home, inner, (*above, name))


def _recipe(home: Home, name: str) -> Artefact | None:
    """The artefact of a recipe's name, None for any other model. Raises ModelNotFound."""
    if parse_model_name(name) is None:
        return None
    record = read_artefact(find_artefact(home, name))
    return record if record.kind == KIND else None


def _online(home: Home, names: Sequence[str | None]) -> bool:
    """Whether one of the models would be downloaded."""
    return any(resolve(n, home).needs_network for n in names if n is not None and parse_model_name(n) is None)


def _finish(home: Home, folder: Path, online: bool) -> None:
    """What needs torch: in a process of its own."""
    done = subprocess.run(
        [*COMMAND, str(folder)], capture_output=True, text=True, env=worker_env(home, online=online), check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SpecError(f"The recipe cannot be made: {last}", param="recipe")


def sources_of(names: Sequence[str], root: Path) -> list[Source]:
    """The files that paths stand for, relative to `root`; a folder gives its documents, sorted. Raises SpecError."""
    found: list[Source] = []
    for name in names:
        path = root / Path(name).expanduser()
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()]
            if not inside:
                raise SpecError(f"The folder '{name}' holds no files that end in {', '.join(SUFFIXES)}.", param="data")
            found += [Source(str(p.relative_to(path)), p) for p in inside]
        elif path.is_file():
            found.append(Source(path.name, path))
        else:
            raise SpecError(f"There is no file or folder '{name}'.", param="data")
    return found
