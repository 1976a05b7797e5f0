"""Few-shot: solved examples in front of the conversation, the same ones for all or the most similar to the question.

In-context learning as in Brown et al. 2020 (arXiv 2005.14165); choosing by similarity as in Liu et al. 2021
(arXiv 2101.06804), the most similar last.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field

from tunewright.core.conversation import Conversation
from tunewright.core.errors import SpecError
from tunewright.data.validate import read_conversations
from tunewright.engine.recipes.base import KEY, Card, Message, RecipeOptions, Row, Search, Source, limited
from tunewright.engine.recipes.texts import after_system, question, with_system


class FewShotOptions(RecipeOptions):
    k: int = Field(4, ge=1, le=64, description="examples in front of the conversation")
    by: Literal["random", "similarity"] = Field(
        "random", description="`random`: the same k for every question; `similarity`: the k nearest to it"
    )
    seed: int = Field(0, ge=0, le=2_147_483_647, description="draws the examples of `random`, and their order")
    system: str = Field("", max_length=100_000, description="put in front of the conversation's system message")
    encoder: str = Field(
        "all-minilm-l6-v2", min_length=1, description="the model whose sentence vectors `similarity` compares"
    )


class FewShot:
    """k solved examples in front of the conversation."""

    card = Card("few-shot examples", does="rewrite", data="rows")
    Options = FewShotOptions

    def __init__(self, options: FewShotOptions) -> None:
        self.options = options

    @property
    def encoder(self) -> str | None:
        return self.options.encoder if self.options.by == "similarity" else None

    def make_rows(self, sources: Sequence[Source]) -> list[Row]:
        """The examples of the data file. Raises DataError, SpecError."""
        rows = limited((_example(c, s.name) for s in sources for c in read_conversations(s.path, name=s.name)), "rows")
        if len(rows) < self.options.k:
            raise SpecError(f"k is {self.options.k}, but the data has {len(rows)} example(s).", param="recipe")
        return rows

    def rewrite(
        self, messages: Sequence[Message], rows: Sequence[Row], search: Search
    ) -> tuple[list[Message], list[str]]:
        chosen = [rows[i] for i in self._choose(question(messages), len(rows), search)]
        turns = [turn for row in chosen for turn in row["messages"]]
        return after_system(with_system(messages, self.options.system), turns), []

    def _choose(self, said: str, n: int, search: Search) -> list[int]:
        if self.options.by == "similarity":
            return search(said, self.options.k)[::-1]
        return random.Random(self.options.seed).sample(range(n), self.options.k)


def _example(row: Conversation, name: str) -> Row:
    """A row as the turns of an example, without a system message, which would stand in the middle."""
    turns = list(_turns(row))
    said = [t["content"] for t in turns if t["role"] == "user" and t.get("content")]
    if not said or turns[-1]["role"] != "assistant" or row.shape == "unpaired":
        raise SpecError(
            f"{name} line {row.source}: an example is a user message and the assistant's answer to it, or a text with "
            f"a label; this row is of shape '{row.shape}' and " + _why_not(row, bool(said), turns),
            param="data",
        )
    return {KEY: said[-1], "messages": turns}


def _why_not(row: Conversation, asked: bool, turns: list[Message]) -> str:
    if row.shape == "unpaired":
        return "marks an answer as good or bad, which is no example."
    return f"ends with role '{turns[-1]['role']}'." if asked else "has no user message."


def _turns(row: Conversation) -> Iterator[Message]:
    if row.shape == "labelled":
        both = [row.text or "", *([row.text_pair] if row.text_pair else [])]
        yield {"role": "user", "content": "\n".join(both)}
        yield {"role": "assistant", "content": row.label_text}
        return
    for message in row.messages:
        if message.role not in ("system", "developer"):
            yield message.model_dump(exclude_none=True, exclude={"weight"})
