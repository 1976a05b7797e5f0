"""/v1/tunewright/recipes: models made without training, of models, prompts and uploaded files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from tunewright.api.body import json_body
from tunewright.api.errors import parse
from tunewright.api.lookup import is_expired
from tunewright.api.present import recipe
from tunewright.api.requests import CreateRecipe
from tunewright.api.schemas import ListPage, Recipe
from tunewright.api.state import ORG, Server, server_of
from tunewright.core.errors import UserError
from tunewright.core.recipe import parse_recipe_spec
from tunewright.core.run import list_recipes
from tunewright.engine.recipes.base import Source
from tunewright.jobs.prepare import link_or_copy
from tunewright.jobs.recipes import create_recipe

router = APIRouter()
PATH = "/v1/tunewright/recipes"


@router.post(PATH)
def make_recipe(request: Request, body: Annotated[Any, Depends(json_body)]) -> Recipe:
    """A new model; with an index to be computed it takes as long as encoding the rows."""
    server = server_of(request)
    wanted = parse(CreateRecipe, body)
    spec = parse_recipe_spec(wanted.model_dump())
    with _uploaded(server, spec.data) as sources:
        return recipe(create_recipe(server.home, spec, sources, org=ORG, allow_paths=False))


@router.get(PATH)
def recipes(request: Request) -> ListPage[Recipe]:
    """All of them, newest first."""
    return ListPage[Recipe](data=[recipe(folder) for folder in reversed(list_recipes(server_of(request).home))])


@contextmanager
def _uploaded(server: Server, ids: list[str]) -> Iterator[list[Source]]:
    """The bytes of uploaded files, linked to where nobody deletes them meanwhile. Raises UserError."""
    with tempfile.TemporaryDirectory(prefix="recipe-", dir=server.home.cache) as place:
        found = []
        for number, file_id in enumerate(ids):
            with server.changing:
                row = server.store.get_file(file_id)
                if row is None or is_expired(row):
                    raise UserError(f"No such File object: {file_id}", param=f"data[{number}]")
                path = Path(place) / str(number)
                link_or_copy(server.home.blob(row.sha256), path)
            found.append(Source(row.filename, path))
        yield found
