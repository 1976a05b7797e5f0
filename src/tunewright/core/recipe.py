"""The spec of a recipe: a model made without training, from other models, a prompt, examples or documents."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tunewright.core.spec import Part, parse_as


class RecipeSpec(BaseModel):
    """What `tunewright recipe create` and POST /v1/tunewright/recipes make a model of.

    recipe: a row of the table, `few_shot` or `{name: few_shot, k: 8}`.
    model: the model below: one of the catalogue, an `ft:` model or another recipe. Of `proxy` the large model, of
        `mixture` the one that writes the answer.
    data: `few_shot`: one file of chat rows; `retrieval`: text and Markdown files, or folders of them. Paths on the
        command line, ids of uploaded files over HTTP.
    suffix: up to 64 letters, digits, `.`, `_`, `-` in the new model's name.
    decoding: default sampling parameters, over those of the model below.
    """

    model_config = ConfigDict(extra="forbid")
    recipe: Part
    model: str = Field(min_length=1)
    data: list[str] = Field(default_factory=list)
    suffix: str | None = Field(None, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")
    decoding: dict[str, Any] = Field(default_factory=dict)

    @field_validator("data", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else [] if value is None else value


def parse_recipe_spec(raw: Any) -> RecipeSpec:
    """A RecipeSpec from plain data. Raises one SpecError that lists everything wrong, with the nearest field names."""
    return parse_as(RecipeSpec, raw, "recipe")
