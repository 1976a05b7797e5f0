"""Trace: one served request. Convertible to a Conversation, so that production traffic is one more data format."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tunewright.core.conversation import Conversation, Message


class Trace(BaseModel):
    """One request and its answer, in the names of OpenTelemetry's GenAI conventions where they have one.

    duration_s: seconds from request to the last token. time_to_first_token_s: seconds to the first one.
    contexts: the passages that a retrieval recipe put into the prompt.
    """

    model_config = ConfigDict(extra="forbid")
    id: str
    created_at: float
    model: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    completion: Message
    finish_reason: str
    input_tokens: int
    output_tokens: int
    duration_s: float
    time_to_first_token_s: float | None = None
    contexts: list[str] | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    feedback: float | None = None

    def to_conversation(self) -> Conversation:
        """The request's messages followed by the answer, as a training row."""
        return Conversation(
            messages=[*self.messages, self.completion],
            tools=self.tools,
            contexts=self.contexts,
            reward=self.feedback,
        )
