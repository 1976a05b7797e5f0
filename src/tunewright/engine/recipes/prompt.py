"""Prompt template: a system text, and a text around every user message."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, field_validator, model_validator

from tunewright.engine.recipes.base import Card, Message, RecipeOptions, Row, Search
from tunewright.engine.recipes.texts import check_template, fill, question, with_system


class PromptOptions(RecipeOptions):
    system: str = Field("", max_length=100_000, description="put in front of the conversation's system message")
    template: str = Field(
        "{input}",
        max_length=100_000,
        description="what the model reads of each user message; `{input}` is the message, other braces are plain text",
    )

    @field_validator("template")
    @classmethod
    def _places(cls, value: str) -> str:
        return check_template(value, ("input",))

    @model_validator(mode="after")
    def _something(self) -> PromptOptions:
        if not self.system and self.template == "{input}":
            raise ValueError("it changes nothing; give 'system', 'template' or both")
        return self


class Prompt:
    """A prompt template: a system text, a text around each user message, or both."""

    card = Card("prompt template", does="rewrite")
    Options = PromptOptions
    encoder = None

    def __init__(self, options: PromptOptions) -> None:
        self.options = options

    def rewrite(
        self, messages: Sequence[Message], rows: Sequence[Row], search: Search
    ) -> tuple[list[Message], list[str]]:
        question(messages)
        filled = [self._around(m) if m.get("role") == "user" else m for m in messages]
        return with_system(filled, self.options.system), []

    def _around(self, message: Message) -> Message:
        """Earlier user messages are wrapped too: the model then sees them as it did when it answered them."""
        return {**message, "content": fill(self.options.template, {"input": message.get("content") or ""})}
