"""Who computes what in a step: first come, first served, at most so many at once, prompts in bounded chunks."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tunewright.core.errors import Busy
from tunewright.engine.kv_cache import Cache
from tunewright.engine.request import Settled
from tunewright.engine.text import TextStream


@dataclass(frozen=True)
class Limits:
    """max_running: sequences (choices) computed at once. max_waiting: requests that may queue.

    chunk_tokens: prompt tokens in one step; more makes prompts faster and running answers wait longer.
    max_models, max_adapters: weights, and adapters over each, that stay loaded.
    """

    max_running: int = 16
    max_waiting: int = 512
    chunk_tokens: int = 512
    max_models: int = 3
    max_adapters: int = 32


@dataclass(eq=False)
class Sequence:
    """One choice of a request. tokens: the prompt, then what was generated.

    virtual: tokens of a soft prompt that stand in the cache before them.
    target, model: the weights, and where they are loaded. helpers: of an answer whose tokens are chosen from the logits
    of several models, the sequences of the others: they share `tokens`, start and end with their leader, and each
    model's `logits` of the next token, times `weight`, are added up once all are there.
    shares: whether it takes over the prompt from another choice of its request; waits: while that one computes it.
    """

    request: Any
    index: int
    tokens: list[int]
    n_prompt: int
    end: int
    how: Settled
    text: TextStream
    virtual: int = 0
    cache: Cache | None = None
    counts: Counter[int] = field(default_factory=Counter)
    finish_reason: str | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    target: Any = None
    model: Any = None
    weight: float = 1.0
    logits: Any = None
    leader: Sequence | None = None
    helpers: list[Sequence] = field(default_factory=list)
    shares: bool = False
    waits: bool = False

    @property
    def team(self) -> list[Sequence]:
        """A leader and its helpers."""
        return [self, *self.helpers]

    @property
    def place(self) -> Cache:
        """The cache of a running sequence."""
        if self.cache is None:
            raise RuntimeError("the sequence is not running")
        return self.cache

    @property
    def n_done(self) -> int:
        """Tokens whose keys and values are in the cache, after the virtual ones."""
        return self.cache.length - self.virtual if self.cache is not None else 0

    @property
    def n_new(self) -> int:
        """Tokens still to be computed before the next one can be chosen."""
        return len(self.tokens) - self.n_done

    @property
    def n_generated(self) -> int:
        return len(self.tokens) - self.n_prompt


class Scheduler:
    """The queue and the running sequences. Strictly first come, first served: nobody can be overtaken for ever."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequences: list[Sequence]) -> None:
        """Queue a request's sequences. Raises Busy when too many wait already."""
        if len(self.waiting) + len(sequences) > max(self.limits.max_waiting, len(sequences)):
            raise Busy(
                f"{len(self.waiting)} answers are waiting already and at most {self.limits.max_waiting} may. "
                "Try again in a few seconds.",
                code="queue_full",
            )
        self.waiting.extend(sequences)

    def admit(self, start: Callable[[Sequence], bool]) -> None:
        """Move sequences from the queue to the running ones while there is room.

        start: makes a sequence ready to run, or takes it and its siblings out of the queue if it cannot be; False means
        its weights have to wait until others have finished. A leader and its helpers start together.
        """
        while self.waiting and (len(self.running) + len(self.waiting[0].team) <= self._room):
            sequence = self.waiting[0]
            if not start(sequence):
                return
            if sequence.finish_reason is None:  # else its request failed and has left the queue
                self.running.extend(self.waiting.popleft().team)

    @property
    def _room(self) -> int:
        """Sequences that may run; a team larger than that runs alone."""
        return self.limits.max_running if self.running else max(self.limits.max_running, len(self.waiting[0].team))

    def plan(self) -> list[tuple[Sequence, int]]:
        """What the step computes: (sequence, new tokens). Running answers each get their token, prompts share the rest.

        A prompt that does not fit is computed over several steps; the oldest comes first. One that waits has none.
        """
        left = self.limits.chunk_tokens
        out = []
        for s in self.running:
            if s.waits:
                continue
            n = 1 if s.n_new == 1 else min(s.n_new, left)
            if s.n_new > 1:
                left -= n
            if n:
                out.append((s, n))
        return out

    def remove(self, sequence: Sequence) -> None:
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)
