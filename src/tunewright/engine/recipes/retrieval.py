"""Retrieval: the passages of a document folder that are nearest to the question are put into the prompt.

Retrieval-augmented generation (Lewis et al. 2020, arXiv 2005.11401) with a frozen encoder and a frozen reader.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, field_validator

from tunewright.engine.recipes.base import KEY, Card, Message, RecipeOptions, Row, Search, Source, limited
from tunewright.engine.recipes.passages import make_passages
from tunewright.engine.recipes.texts import check_template, fill, question, with_question, with_system

TEMPLATE = "Passages:\n\n{passages}\n\nAnswer with their help, where they say something about it: {input}"


class RetrievalOptions(RecipeOptions):
    k: int = Field(3, ge=1, le=64, description="passages in the prompt")
    passage_chars: int = Field(800, ge=100, le=8000, description="characters that a passage may have")
    template: str = Field(
        TEMPLATE,
        max_length=100_000,
        description="what the model reads of the last user message, with `{passages}` and `{input}`",
    )
    system: str = Field("", max_length=100_000, description="put in front of the conversation's system message")
    encoder: str = Field("all-minilm-l6-v2", min_length=1, description="the model whose sentence vectors are compared")

    @field_validator("template")
    @classmethod
    def _places(cls, value: str) -> str:
        return check_template(value, ("passages", "input"))


class Retrieval:
    """The k nearest passages of a folder of documents in the prompt."""

    card = Card("retrieval over documents", does="rewrite", data="documents")
    Options = RetrievalOptions

    def __init__(self, options: RetrievalOptions) -> None:
        self.options = options

    @property
    def encoder(self) -> str | None:
        return self.options.encoder

    def make_rows(self, sources: Sequence[Source]) -> list[Row]:
        """The passages of the documents. Raises SpecError."""
        return limited(make_passages(sources, self.options.passage_chars), "passages")

    def rewrite(
        self, messages: Sequence[Message], rows: Sequence[Row], search: Search
    ) -> tuple[list[Message], list[str]]:
        """The new conversation, and the passages in it, nearest first."""
        said = question(messages)
        contexts = [rows[i][KEY] for i in search(said, min(self.options.k, len(rows)))]
        shown = "\n\n".join(f"[{n}] {text}" for n, text in enumerate(contexts, 1))
        asked = with_question(messages, fill(self.options.template, {"passages": shown, "input": said}))
        return with_system(asked, self.options.system), contexts
