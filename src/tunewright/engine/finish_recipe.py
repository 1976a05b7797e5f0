"""`python -m tunewright.engine.finish_recipe FOLDER`: what of a new recipe needs torch or the models' files.

The index of its rows, and whether models whose logits are to be added speak one vocabulary. An error is its message
on stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from tunewright.core.errors import TunewrightError
from tunewright.core.home import Home, find_home
from tunewright.core.run import Artefact, read_artefact
from tunewright.engine.artefacts import Artefacts
from tunewright.engine.encoder import Encoders, write_index
from tunewright.engine.follow import combined_parts, places
from tunewright.engine.recipes.base import INDEX, KEY, read_rows, recipe_of
from tunewright.engine.scheduler import Limits
from tunewright.ops.runtime import set_threads


def finish(folder: Path, home: Home) -> None:
    """Raises what is wrong with the encoder or the models."""
    record = read_artefact(folder)
    recipe = recipe_of(record)
    if recipe.card.does == "combine":
        combined_parts(recipe, places(home, record, recipe), Artefacts(home, torch.float32, Limits()))
    if recipe.encoder is not None:
        make_index(folder, record, recipe, home)


def make_index(folder: Path, record: Artefact, recipe: Any, home: Home) -> None:
    keys = [row[KEY] for row in read_rows(folder)]
    write_index(folder / INDEX, Encoders(home).get(recipe.encoder).encode(keys), recipe.encoder)


if __name__ == "__main__":
    set_threads("auto")
    try:
        finish(Path(sys.argv[1]), find_home())
    except TunewrightError as e:
        sys.exit(e.message)
