"""From a request to a recipe, to the model or models that answer it. A request to any other model passes through."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunewright.core.durable import MANIFEST, check_folder
from tunewright.core.errors import CheckpointError, ModelNotFound, UserError
from tunewright.core.home import Home
from tunewright.core.ids import parse_model_name
from tunewright.core.run import ARTEFACT, Artefact, find_artefact, read_artefact
from tunewright.engine.artefacts import Artefacts, Target
from tunewright.engine.encoder import Encoders, nearest, read_index
from tunewright.engine.recipes.base import INDEX, Row, Search, other_models, read_rows, recipe_of
from tunewright.engine.request import DECODING, GenerateRequest

RECIPE = "recipe"
MAX_DEPTH = 8
_KEPT = 16
Place = dict[str, Any]  # the fields `base` and `artefact` of a request


@dataclass(frozen=True)
class Opened:
    """A recipe as it is served. models: name and place of the model below it, then of the others that it needs."""

    record: Artefact
    recipe: Any
    rows: list[Row]
    search: Search
    models: list[tuple[str, Place]]

    @property
    def below(self) -> Place:
        return self.models[0][1]


@dataclass(frozen=True)
class Followed:
    """What to do. parts: models whose weighted logits choose the tokens; of nearly every request one, with weight 1.

    mixture: a mixture of agents to be asked instead; parts is then empty. notes: what the answer says of its making.
    above: the recipes that led here.
    """

    asked: GenerateRequest
    parts: list[tuple[Target, float]]
    mixture: Opened | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    above: tuple[str, ...] = ()


class Recipes:
    """The recipes that are open. Belongs to the engine's thread."""

    def __init__(self, artefacts: Artefacts) -> None:
        self.artefacts = artefacts
        self.encoders = Encoders(artefacts.home)
        self._opened: OrderedDict[tuple[str, int, int], Opened] = OrderedDict()

    def follow(self, asked: GenerateRequest, above: tuple[str, ...] = ()) -> Followed:
        """Rewrite the request until it is for a model with logits, or for a mixture.

        above: the recipes that led to this request. Raises what Artefacts.resolve raises, and UserError for recipes
        that go round in a circle or need messages.
        """
        notes: dict[str, Any] = {}
        while (opened := self._open(asked)) is not None:
            above = _deeper(above, opened.record.name)
            asked = _with_defaults(asked, opened.record.decoding)
            if opened.recipe.card.does == "combine":
                parts = combined_parts(opened.recipe, opened.models, self.artefacts)
                return Followed(asked, parts, notes=notes, above=above)
            if asked.messages is None:
                raise UserError(
                    f"The model '{opened.record.name}' works on a conversation; send 'messages', not 'prompt'.",
                    param="prompt",
                )
            if opened.recipe.card.does == "mix":
                return Followed(asked, [], opened, notes, above)
            messages, contexts = opened.recipe.rewrite(asked.messages, opened.rows, opened.search)
            if contexts:
                notes["contexts"] = [*notes.get("contexts", []), *contexts]
            asked = asked.model_copy(update={"messages": messages, **opened.below})
        return Followed(asked, [(self.artefacts.resolve(asked.base, asked.artefact), 1.0)], notes=notes, above=above)

    def clear(self) -> None:
        """Forget what is loaded."""
        self._opened.clear()
        self.encoders.clear()

    def _open(self, asked: GenerateRequest) -> Opened | None:
        """The recipe that the request names, or None if it names a model."""
        folder = _folder(asked, self.artefacts.home)
        if folder is None or not (folder / ARTEFACT).is_file():
            return None  # what is wrong with it is told when the model is resolved
        written = (folder / ARTEFACT).stat()
        key = (str(folder), written.st_mtime_ns, written.st_ino)
        if key not in self._opened:
            record = read_artefact(folder)
            if record.kind != RECIPE:
                return None
            self._opened[key] = self._read(folder, record)
            if len(self._opened) > _KEPT:
                self._opened.popitem(last=False)
        self._opened.move_to_end(key)
        return self._opened[key]

    def _read(self, folder: Path, record: Artefact) -> Opened:
        if (folder / MANIFEST).is_file():
            check_folder(folder)
        recipe, rows = recipe_of(record), read_rows(folder)
        models = places(self.artefacts.home, record, recipe)
        return Opened(record, recipe, rows, self._search(folder, recipe.encoder, rows), models)

    def _search(self, folder: Path, encoder: str | None, rows: Sequence[Row]) -> Search:
        if encoder is None:
            return _no_index
        vectors_ND = read_index(folder / INDEX, len(rows))
        return lambda text, k: nearest(vectors_ND, self.encoders.get(encoder).encode([text])[0], k)


def places(home: Home, record: Artefact, recipe: Any) -> list[tuple[str, Place]]:
    """Name and place of every model that a recipe needs, the one below it first. Raises ModelNotFound."""
    return [(name, place_of(home, name, record)) for name in (str(record.base), *other_models(recipe))]


def combined_parts(
    recipe: Any, models: Sequence[tuple[str, Place]], artefacts: Artefacts
) -> list[tuple[Target, float]]:
    """The models of a recipe that adds logits, with their factors. Raises UserError unless their token ids agree."""
    targets = [artefacts.resolve(**place) for _, place in models]
    first = targets[0].tokenizer
    for (name, _), target in zip(models, targets, strict=True):
        if target.tokenizer.vocabulary != first.vocabulary:
            raise UserError(
                f"The models '{models[0][0]}' and '{name}' have different vocabularies ({first.vocab_size:,} and "
                f"{target.tokenizer.vocab_size:,} tokens): a token id does not mean the same to both, so their logits "
                "cannot be added. Use models with one tokenizer, such as sizes of one family.",
                param="recipe",
                code="different_vocabularies",
            )
    return list(zip(targets, recipe.weights(), strict=True))


def place_of(home: Home, name: str, record: Artefact) -> Place:
    """Where a model that a recipe names is. Raises ModelNotFound with the recipe's name."""
    if parse_model_name(name) is None:
        return {"base": name, "artefact": None}
    try:
        return {"base": None, "artefact": str(find_artefact(home, name))}
    except ModelNotFound as e:
        raise ModelNotFound(
            f"The recipe '{record.name}' needs the model '{name}', which does not exist any more. Make the recipe "
            "again over another model.",
            param="model",
        ) from e


def _folder(asked: GenerateRequest, home: Home) -> Path | None:
    """Where the artefact that the request names may be."""
    if asked.artefact is not None:
        return Path(asked.artefact)
    name = parse_model_name(str(asked.base))
    return None if name is None else home.recipes / name.id


def _deeper(above: tuple[str, ...], name: str) -> tuple[str, ...]:
    if name in above:
        circle = " -> ".join([*above[above.index(name) :], name])
        raise UserError(f"These recipes go round in a circle: {circle}. Make one of them again.", param="model")
    if len(above) >= MAX_DEPTH:
        raise UserError(f"More than {MAX_DEPTH} recipes stand upon each other: {' -> '.join(above)}.", param="model")
    return (*above, name)


def _with_defaults(asked: GenerateRequest, decoding: dict[str, Any]) -> GenerateRequest:
    """The request's own values, else the recipe's; those of the models below come after both."""
    known = {k: v for k, v in decoding.items() if k in DECODING and v is not None and getattr(asked, k) is None}
    return asked.model_copy(update=known) if known else asked


def _no_index(text: str, k: int) -> list[int]:
    raise CheckpointError("This recipe has no index to search.")
