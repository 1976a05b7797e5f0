"""Conversation: the one canonical row, in OpenAI's chat schema. Every data format becomes this; traces too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = ("system", "developer", "user", "assistant", "tool")
Shape = Literal["chat", "preference", "unpaired", "prompt", "text", "labelled"]
BESIDE = ("tools", "parallel_tool_calls", "functions")  # what is offered with a prompt; graders know the rest of a row
REFERENCE = "reference_answer"


class FunctionCall(BaseModel):
    """`arguments` is a JSON text, as on OpenAI's wire."""

    model_config = ConfigDict(extra="forbid")
    name: str
    arguments: str


class ToolCall(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """One turn. `weight` (assistant only) is the loss weight of the turn: 0 or 1; None means the default."""

    model_config = ConfigDict(extra="forbid")
    role: Role
    content: str | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    weight: float | None = None


class Conversation(BaseModel):
    """One row.

    messages: the turns (empty only for a plain-text row).
    tools: function definitions in OpenAI's schema, offered to the model.
    contexts: retrieved passages, for question answering over documents.
    preferred, rejected: the two answers of a preference row; `messages` is then their shared input.
    text: the row of a plain-text corpus, or what a label belongs to. text_pair: a second text that it is about, too.
    label, reward: what a classifier (several classes: a list) or a grader says of the row; without a text, label says
        whether the answer at the end of `messages` is a good one.
    margin: by how much the preferred answer is better, in units of reward.
    item: of a prompt to be answered and graded: what graders know of the row.
    source: where the row came from (1-based line or row number).
    """

    model_config = ConfigDict(extra="forbid")
    messages: list[Message] = Field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    parallel_tool_calls: bool | None = None
    contexts: list[str] | None = None
    preferred: list[Message] | None = None
    rejected: list[Message] | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | float | bool | list[str] | None = None
    reward: float | None = None
    margin: float | None = None
    item: dict[str, Any] | None = None
    source: int = 0

    @property
    def shape(self) -> Shape:
        """Which objectives can use the row: `text`, `labelled`, `preference`, `unpaired`, `prompt` or `chat`."""
        if self.text is not None:
            return "text" if self.label is None else "labelled"
        if self.preferred is not None:
            return "preference"
        if self.label is not None:
            return "unpaired"
        answers = any(m.role == "assistant" and m.weight != 0 for m in self.messages)
        return "chat" if answers or not self.messages else "prompt"

    @property
    def label_text(self) -> str:
        """The label as one text; several classes with commas between."""
        return ", ".join(self.label) if isinstance(self.label, list) else str(self.label)


def item_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What graders know of a row of a file as `item`: its fields, with the prompt as `messages` (or `prompt`). An
    assistant message at the end is no part of that, but `reference_answer`, unless the row has such a field itself."""
    item = {name: value for name, value in row.items() if name not in BESIDE}
    key = "messages" if "messages" in row or "prompt" not in row else "prompt"
    said = row[key] if isinstance(row.get(key), list) else []
    last = said[-1] if said else None
    if isinstance(last, dict) and last.get("role") == "assistant":
        item = {REFERENCE: last.get("content") or "", **item, key: said[:-1]}
    return item
