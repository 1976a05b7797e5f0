"""Mixture of agents (Wang et al. 2024, arXiv 2406.04692): several models propose, one writes the answer.

In every layer each proposer answers; from the second layer on it sees the proposals of the layer before. The model
below the recipe, the aggregator, sees those of the last one.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, field_validator

from tunewright.engine.recipes.base import Card, Message, RecipeOptions
from tunewright.engine.recipes.texts import check_template, fill, question, with_system

TEMPLATE = (
    "Other assistants answered the user's last message as listed below. Some of it may be wrong. Weigh the answers "
    "against each other, keep what is right, and write one answer of your own.\n\n{proposals}"
)


class MixtureOptions(RecipeOptions):
    proposers: list[str] = Field(
        min_length=1, max_length=8, description="the models that propose; one may be named several times"
    )
    layers: int = Field(1, ge=1, le=4, description="rounds of proposals before the answer")
    max_tokens: int = Field(256, ge=1, le=8192, description="tokens of a proposal")
    temperature: float | None = Field(
        None, ge=0, le=2, description="of the proposals; null is the request's (a model named twice needs more than 0)"
    )
    template: str = Field(
        TEMPLATE, max_length=100_000, description="the system text that shows earlier `{proposals}` to a model"
    )

    @field_validator("template")
    @classmethod
    def _places(cls, value: str) -> str:
        return check_template(value, ("proposals",))


class Mixture:
    """Answers of several models, made into one by the model below."""

    card = Card("mixture of agents", does="mix", models=("proposers",))
    Options = MixtureOptions
    encoder = None

    def __init__(self, options: MixtureOptions) -> None:
        self.options = options

    def conversation(self, messages: Sequence[Message], before: Sequence[str]) -> list[Message]:
        """What a model is asked. before: the proposals of the layer before, none in the first."""
        question(messages)
        shown = "\n\n".join(f"[{n}] {text.strip()}" for n, text in enumerate(before, 1))
        return with_system(messages, fill(self.options.template, {"proposals": shown}) if before else "")
