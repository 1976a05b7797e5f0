"""A request to a mixture of agents in progress: layers of proposals, then the answer. Each is a request of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tunewright.core.errors import TunewrightError
from tunewright.engine.follow import Opened, Place
from tunewright.engine.request import GenerateRequest

Event = dict[str, Any]
Emit = Callable[[Event], None]
_KEPT = ("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty", "seed")


@dataclass(eq=False)
class Mixing:
    """asked: the client's request; its events go to `emit`.

    add, drop: the engine's ways to queue a request and to abort one. guard: calls what may fail inside another
    request's step, and turns a failure into this one's error event.
    """

    asked: GenerateRequest
    opened: Opened
    emit: Emit
    add: Callable[[GenerateRequest, Emit], int]
    drop: Callable[[int], None]
    guard: Callable[[Callable[[], None], Callable[[TunewrightError], None]], None]
    notes: Event = field(default_factory=dict)
    layer: int = 0
    answers: list[str | None] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def proposers(self) -> list[tuple[str, Place]]:
        return self.opened.models[1:]

    def begin(self) -> None:
        """Ask the first layer. Raises what queueing a request raises."""
        self._ask_proposers([])

    def stop(self) -> None:
        """Abort what still runs."""
        for number in self.numbers:
            self.drop(number)

    def _ask_proposers(self, before: list[str]) -> None:
        self.layer += 1
        self.answers = [None] * len(self.proposers)
        for at, (_, place) in enumerate(self.proposers):
            self._send(self._proposal(before, place, at), lambda event, at=at: self._hear(at, event))

    def _ask_aggregator(self) -> None:
        said = self._said()
        names = [name for name, _ in self.proposers]
        self.notes["proposals"] = [{"model": m, "text": t} for m, t in zip(names, said, strict=True)]
        messages = self.opened.recipe.conversation(self.asked.messages or [], said)
        self._send(self.asked.model_copy(update={"messages": messages, **self.opened.below}), self._forward)

    def _proposal(self, before: list[str], place: Place, at: int) -> GenerateRequest:
        """Sampled as the request asks; a model that is named twice answers differently unless it is greedy."""
        options = self.opened.recipe.options
        own = {name: getattr(self.asked, name) for name in _KEPT}
        if options.temperature is not None:
            own["temperature"] = options.temperature
        if self.asked.seed is not None:
            own["seed"] = self.asked.seed + self.layer * len(self.proposers) + at
        messages = self.opened.recipe.conversation(self.asked.messages or [], before)
        return GenerateRequest(messages=messages, max_tokens=options.max_tokens, **own, **place)

    def _send(self, asked: GenerateRequest, emit: Emit) -> None:
        self.numbers.append(self.add(asked, emit))

    def _hear(self, at: int, event: Event) -> None:
        """An event of proposer `at`: the last answer of a layer begins the next one."""
        if event["type"] == "error":
            self._end(event)
        if event["type"] != "done":
            return
        self._count(event)
        self.answers[at] = event["choices"][0]["text"]
        if all(a is not None for a in self.answers):
            last = self.layer >= self.opened.recipe.options.layers
            self.guard(self._ask_aggregator if last else lambda: self._ask_proposers(self._said()), self._fail)

    def _forward(self, event: Event) -> None:
        """An event of the aggregator: it is the client's, with the usage of all."""
        if event["type"] == "error":
            self._end(event)
        elif event["type"] == "done":
            self._count(event)
            usage = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
            usage["total_tokens"] = self.prompt_tokens + self.completion_tokens
            self._end({**event, "usage": usage, "extra": self.notes})
        else:
            self.emit(event)

    def _said(self) -> list[str]:
        return [answer or "" for answer in self.answers]

    def _count(self, event: Event) -> None:
        self.prompt_tokens += event["usage"]["prompt_tokens"]
        self.completion_tokens += event["usage"]["completion_tokens"]
        found = event.get("extra", {}).get("contexts", [])
        if found:
            self.notes["contexts"] = list(dict.fromkeys([*self.notes.get("contexts", []), *found]))

    def _fail(self, error: TunewrightError) -> None:
        self._end({"type": "error", "error": error.to_openai(), "status": error.status})

    def _end(self, event: Event) -> None:
        self.stop()
        self.emit(event)
