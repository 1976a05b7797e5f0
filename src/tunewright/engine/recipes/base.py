"""What all recipes share: their capability row, how options are checked, what their folder holds.

A recipe does one of three things, and the engine has one way to serve each:

rewrite   `rewrite(messages, rows, search) -> (messages, contexts)`: another conversation for the model below
combine   `weights()`: factors of the logits of the model below and of `card.models`, which are added up
mix       `conversation(messages, before)`: what proposers, and in the end the model below, are asked

What is made of files has `make_rows(sources)`; `encoder` names the model whose vectors find rows, or is None.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tunewright.core.durable import write_atomic
from tunewright.core.errors import SpecError
from tunewright.core.run import Artefact
from tunewright.core.spec import Part, explain_validation
from tunewright.engine.recipes import RECIPES

ROWS, INDEX = "rows.jsonl", "index.safetensors"
KEY = "key"  # of a row: the text that a similar question is looked up by
MAX_ROWS = 100_000

Message = dict[str, Any]
Row = dict[str, Any]
Search = Callable[[str, int], list[int]]


@dataclass(frozen=True)
class Card:
    """The capability row. does: see above. data: what files it is made of.

    models: the options that hold names of further models (a text or a list of them).
    """

    title: str
    does: Literal["rewrite", "combine", "mix"]
    data: Literal["", "rows", "documents"] = ""
    models: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """A file that a recipe is made of. name: as the user knows it."""

    name: str
    path: Path


class RecipeOptions(BaseModel):
    """Base of the recipes' option blocks: unknown names are refused."""

    model_config = ConfigDict(extra="forbid")


def make_recipe(part: Part) -> Any:
    """The recipe with its options checked. Raises SpecError with what is allowed and the nearest name."""
    entry = RECIPES.load(part.name)
    try:
        return entry(entry.Options(**part.options))
    except ValidationError as e:
        raise SpecError(explain_validation(e, entry.Options, f"recipe '{part.name}'"), param="recipe") from e


def describe_recipes() -> dict[str, Any]:
    """{name: {"schema", "defaults", "card", "doc"}} as the describe file has it of a job's parts. A default that is
    missing is one that must be given."""
    return {name: _described(RECIPES.load(name)) for name in RECIPES}


def _described(entry: Any) -> dict[str, Any]:
    fields = entry.Options.model_fields
    return {
        "schema": entry.Options.model_json_schema(),
        "defaults": {n: f.get_default(call_default_factory=True) for n, f in fields.items() if not f.is_required()},
        "card": asdict(entry.card),
        "doc": (entry.__doc__ or "").strip().split("\n")[0],
    }


def recipe_of(record: Artefact) -> Any:
    """The recipe of an artefact of kind `recipe`."""
    return make_recipe(Part.model_validate(record.recipe or {"name": ""}))


def other_models(recipe: Any) -> list[str]:
    """The names of the models that a recipe needs beside the one below it, without its encoder."""
    return [name for field in recipe.card.models for name in listed(getattr(recipe.options, field))]


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def write_rows(folder: Path, rows: Iterable[Row]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(folder / ROWS, text.encode())


def read_rows(folder: Path) -> list[Row]:
    """The recipe's rows; none if it has no such file."""
    path = folder / ROWS
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.exists() else []


def limited(rows: Iterable[Row], what: str) -> list[Row]:
    """The rows as a list. Raises SpecError for none and for more than MAX_ROWS."""
    found: list[Row] = []
    for row in rows:
        found.append(row)
        if len(found) > MAX_ROWS:
            raise SpecError(f"There are more than {MAX_ROWS:,} {what}; use fewer or smaller files.", param="data")
    if not found:
        raise SpecError(f"The data holds no {what}.", param="data")
    return found
