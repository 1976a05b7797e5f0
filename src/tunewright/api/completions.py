"""Chat completions from the engine's events: one JSON object, or a stream of server-sent events."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tunewright.api.generation import Event, Generation
from tunewright.api.schemas import (
    Choice,
    Chunk,
    ChunkChoice,
    Completion,
    Extra,
    Logprobs,
    Message,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from tunewright.core.errors import TunewrightError
from tunewright.core.ids import new_id
from tunewright.engine.client import EngineFailed

PING_SECONDS = 10.0
PING = ": ping\n\n"
BROKE_OFF = "The engine stopped before the answer was complete. Send the request again."


@dataclass(frozen=True)
class Answer:
    """What every part of one answer shares."""

    model: str
    metadata: dict[str, str] | None = None
    with_logprobs: bool = False
    include_usage: bool = False
    id: str = field(default_factory=lambda: new_id("chatcmpl-"))
    created: int = field(default_factory=lambda: int(time.time()))


async def whole(answer: Answer, generation: Generation) -> Completion:
    """Wait for the end and return the completion. Raises what the engine reports."""
    tokens: dict[int, list[TokenLogprob]] = {}
    while (event := await generation.next()) is not None:
        if event["type"] == "token" and answer.with_logprobs:
            tokens.setdefault(event["index"], []).extend(token_logprobs(event))
        elif event["type"] == "done":
            return Completion(
                id=answer.id,
                created=answer.created,
                model=answer.model,
                choices=[_choice(answer, c, tokens.get(c["index"], [])) for c in event["choices"]],
                usage=Usage(**event["usage"]),
                metadata=answer.metadata,
                tunewright=_extra(event),
            )
    raise EngineFailed(BROKE_OFF)


def _choice(answer: Answer, choice: dict[str, Any], tokens: list[TokenLogprob]) -> Choice:
    calls = choice.get("tool_calls")
    return Choice(
        index=choice["index"],
        message=Message(content=choice["text"] or (None if calls else ""), tool_calls=calls),
        logprobs=Logprobs(content=tokens) if answer.with_logprobs else None,
        finish_reason=choice["finish_reason"],
    )


async def stream(answer: Answer, generation: Generation, first: Event | None) -> AsyncGenerator[str, None]:
    """The lines of the event stream. first: an event read already, if any.

    An error after the start becomes an event with `error`, which the SDK raises; the stream never just stops short.
    """
    try:
        async for text in _lines(answer, generation, first):
            yield text
        yield "data: [DONE]\n\n"
    except TunewrightError as e:
        yield _data({"error": e.to_openai()})
    finally:
        await generation.stop()


async def _lines(answer: Answer, generation: Generation, first: Event | None) -> AsyncGenerator[str, None]:
    started: set[int] = set()
    event = first
    while True:
        if event is not None:
            for text in _chunks(answer, event, started):
                yield text
            if event["type"] == "done":
                return
        event = None
        with suppress(TimeoutError):
            event = await generation.next(PING_SECONDS)
            if event is None:
                raise EngineFailed(BROKE_OFF)
        if event is None:
            yield PING


def _chunks(answer: Answer, event: Event, started: set[int]) -> list[str]:
    """The event-stream texts of one engine event. started: choices whose role was sent; grows here."""
    if event["type"] == "token":
        if not event["text"] and not answer.with_logprobs:
            return []
        shown = Logprobs(content=token_logprobs(event)) if answer.with_logprobs else None
        choice = ChunkChoice(index=event["index"], delta={"content": event["text"]}, logprobs=shown)
        return [*_role(answer, event["index"], started), _chunk(answer, [choice])]
    if event["type"] != "done":
        return []
    texts = []
    for c in event["choices"]:
        texts += _role(answer, c["index"], started)
        texts += [_delta(answer, c["index"], delta) for delta in _tool_deltas(c.get("tool_calls") or [])]
        end = ChunkChoice(index=c["index"], delta={}, finish_reason=c["finish_reason"])
        texts.append(_chunk(answer, [end], extra=_extra(event) if c is event["choices"][-1] else None))
    if answer.include_usage:
        texts.append(_chunk(answer, [], Usage(**event["usage"])))
    return texts


def _role(answer: Answer, index: int, started: set[int]) -> list[str]:
    if index in started:
        return []
    started.add(index)
    return [_delta(answer, index, {"role": "assistant", "content": "", "refusal": None})]


def _tool_deltas(calls: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Two pieces a call, as OpenAI's: who is called, then with what."""
    for number, call in enumerate(calls):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        head = {"id": call["id"], "type": "function", "function": {"name": name, "arguments": ""}}
        yield {"tool_calls": [{"index": number, **head}]}
        yield {"tool_calls": [{"index": number, "function": {"arguments": arguments}}]}


def _delta(answer: Answer, index: int, delta: dict[str, Any]) -> str:
    return _chunk(answer, [ChunkChoice(index=index, delta=delta)])


def _extra(event: Event) -> Extra | None:
    """What a recipe tells with the last event."""
    return Extra(**event["extra"]) if event.get("extra") else None


def _chunk(answer: Answer, choices: list[ChunkChoice], usage: Usage | None = None, extra: Extra | None = None) -> str:
    chunk = Chunk(
        id=answer.id, created=answer.created, model=answer.model, choices=choices, usage=usage, tunewright=extra
    )
    return _data(dump(chunk, () if answer.include_usage else ("usage",)))


def dump(whole: Completion | Chunk, without: Iterable[str] = ()) -> dict[str, Any]:
    """The object as it is sent: `tunewright` only where it says something."""
    shown = whole.model_dump(exclude={*without, "tunewright"})
    return (
        shown if whole.tunewright is None else {**shown, "tunewright": whole.tunewright.model_dump(exclude_none=True)}
    )


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def token_logprobs(event: Event) -> list[TokenLogprob]:
    """The log-probabilities that ride on one token event: none on text that completes an earlier token."""
    if "logprob" not in event:
        return []
    top = [TopLogprob(**t) for t in event["top_logprobs"]]
    return [TokenLogprob(token=event["token"], bytes=event["bytes"], logprob=event["logprob"], top_logprobs=top)]
