"""The engine: requests in, events out, one step at a time. Continuous batching of any mix of models and adapters.

A step computes, for each loaded model, ONE packed row: the next token of every running answer and a bounded piece of
new prompts. Nothing is padded, and adapters over one base share that row. One thread owns an Engine.

Events of a request, as dicts: {"type": "start", "prompt_tokens"}, then {"type": "token", "index", "text", "token_id",
and with logprobs "token", "bytes", "logprob", "top_logprobs"}, then {"type": "done", "choices", "usage"} or
{"type": "error", "error"}.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tunewright.core.errors import TunewrightError, UserError
from tunewright.core.home import Home
from tunewright.engine.artefacts import Artefacts, Model, Target
from tunewright.engine.attention import Chunk, Singles, StepPlan
from tunewright.engine.request import GenerateRequest, settle
from tunewright.engine.sampler import choose, draw, edit_logits, logprobs
from tunewright.engine.scheduler import Limits, Scheduler, Sequence
from tunewright.engine.text import Piece, TextStream, token_bytes
from tunewright.engine.tools import MARK, parse_tool_calls
from tunewright.ops.runtime import choose_dtype, set_threads

Event = dict[str, Any]
Emit = Callable[[Event], None]
log = logging.getLogger(__name__)

# What a broken model file, a hostile template or a full memory can raise; the request fails, the engine goes on.
FAILURES = (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)


class EngineError(TunewrightError):
    """Computing an answer failed for a reason that is not the request's."""

    code = "engine_error"


@dataclass(eq=False)
class Request:
    """A request in progress. tokens: what there is to report of each generated token, by choice."""

    id: int
    asked: GenerateRequest
    target: Target
    emit: Emit
    n_prompt: int
    sequences: list[Sequence] = field(default_factory=list)
    tokens: list[list[Event]] = field(default_factory=list)
    model: Model | None = None


class Engine:
    """home: the data folder. dtype: auto, float32 or bfloat16. threads: CPU threads, or auto for all."""

    def __init__(
        self, home: Home, dtype: str = "auto", threads: int | str = "auto", limits: Limits | None = None
    ) -> None:
        self.limits = limits or Limits()
        self.dtype = choose_dtype(dtype)
        self.set_threads(threads)
        self.artefacts = Artefacts(home, self.dtype, self.limits)
        self.scheduler = Scheduler(self.limits)
        self.requests: dict[int, Request] = {}
        self._numbers = itertools.count(1)
        self.generated = 0

    def set_threads(self, threads: int | str) -> None:
        """Takes effect for the thread that calls it, which must be the one that calls step()."""
        self.threads = set_threads(threads)

    def add_request(self, asked: GenerateRequest, emit: Emit) -> int:
        """Queue a request; returns its number. `emit` gets its events, from within this call and step().

        Raises UserError (a bad prompt or template; context_length_exceeded), ModelNotFound, Busy (the queue is full).
        """
        target = self.artefacts.resolve(asked.base, asked.artefact)
        tokens = encode(asked, target)
        how = settle(asked, target.decoding)
        context = target.context - target.virtual
        room = context - len(tokens)
        if room < 1:
            raise UserError(
                f"This model's maximum context length is {context} tokens. However, your input has "
                f"{len(tokens)} tokens and leaves no room for an answer. Please shorten the messages.",
                code="context_length_exceeded",
                param="messages" if asked.messages is not None else "prompt",
            )
        end = len(tokens) + min(room, how.max_tokens or room)
        request = Request(next(self._numbers), asked, target, emit, len(tokens))
        decode, hold = target.tokenizer.decode, MARK if asked.tools else ""
        for index in range(asked.n):
            text = TextStream(decode, how.stop, hold)
            sequence = Sequence(request, index, list(tokens), len(tokens), end, how, text, target.virtual)
            request.sequences.append(sequence)
            request.tokens.append([])
        self.scheduler.add(request.sequences)
        self.requests[request.id] = request
        emit({"type": "start", "prompt_tokens": len(tokens)})
        return request.id

    def abort(self, number: int) -> None:
        """Drop a request and free what it holds; an unknown or finished one is nothing to do. Emits nothing."""
        request = self.requests.pop(number, None)
        for sequence in request.sequences if request else ():
            self._free(sequence)
            sequence.finish_reason = sequence.finish_reason or "aborted"

    def load(self, base: str | None, artefact: str | None = None) -> None:
        """Load weights before anybody asks. Raises what resolve() raises, and EngineError if there is no room."""
        target = self.artefacts.resolve(base, artefact)
        with torch.inference_mode():
            model = self.artefacts.acquire(target)
        if model is None:
            raise EngineError("Every model that may stay loaded is in use. Try again when an answer has ended.")
        self.artefacts.release(model, target)

    def unload(self, folder: str | None = None) -> int:
        """Forget idle weights from `folder`, or all idle ones; returns how many."""
        return self.artefacts.unload(folder)

    def step(self) -> bool:
        """Advance every running answer by one token. Returns whether there is more to do."""
        with torch.inference_mode():
            self.scheduler.admit(self._start)
            work: dict[Model, list[tuple[Sequence, int]]] = {}
            for sequence, n in self.scheduler.plan():
                work.setdefault(sequence.request.model, []).append((sequence, n))
            for model, part in work.items():
                try:
                    self._compute(model, part)
                except FAILURES as e:
                    log.exception("a step failed")
                    error = EngineError(f"Computing the answer failed: {first_line(e)}")
                    for request in dict.fromkeys(s.request for s, _ in part):
                        self._fail(request, error)
        return self.scheduler.busy

    def generate(self, asked: GenerateRequest) -> Event:
        """Run one request to its end and return its `done` event (others that run advance too). Raises its error."""
        events: list[Event] = []
        self.add_request(asked, events.append)
        while events[-1]["type"] not in ("done", "error"):
            self.step()
        if events[-1]["type"] == "error":
            raise EngineError(**{k: events[-1]["error"][k] for k in ("message", "code", "param")})
        return events[-1]

    def stats(self) -> Event:
        """What runs and what is loaded; sizes in bytes."""
        models = self.artefacts.models
        return {
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "generated_tokens": self.generated,
            "models": [key.split("@")[0] for key in models],
            "adapters": [key.split("@")[0] for m in models.values() for key in m.adapters],
            "kv_bytes": sum(m.kv.bytes for m in models.values()),
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": self.threads,
        }

    def _start(self, sequence: Sequence) -> bool:
        request = sequence.request
        try:
            model = self.artefacts.acquire(request.target)
        except TunewrightError as e:
            self._fail(request, e)
            return True
        except FAILURES as e:
            log.exception("loading failed")
            self._fail(request, EngineError(f"The model could not be loaded: {first_line(e)}"))
            return True
        if model is None:
            return False
        request.model = model
        sequence.cache = model.kv.open(sequence.virtual + min(len(sequence.tokens) + 32, sequence.end))
        model.kv.put(sequence.cache, model.prefixes.get(request.target.adapter_key, ()))
        return True

    def _compute(self, model: Model, work: list[tuple[Sequence, int]]) -> None:
        """One forward of `model` over the new tokens, then a token for every sequence whose input is complete."""
        for s, n in work:
            model.kv.reserve(s.place, s.place.length + n)  # may move sequences, so before anybody's place is read
        ids, positions, keep, complete = [], [], [], []
        first: dict[Sequence, int] = {}
        for s, n in work:
            first[s] = len(ids)
            ids += s.tokens[s.n_done : s.n_done + n]
            positions += range(s.place.length, s.place.length + n)
            if n == s.n_new:
                keep.append(len(ids) - 1)
                complete.append(s)
        model.routing.parts = _route(work, first)
        net: Any = model.net
        logits_NV = net(
            input_ids=torch.tensor([ids]),
            position_ids=torch.tensor([positions]),
            use_cache=False,
            logits_to_keep=torch.tensor(keep or [0]),
            kv=_plan(work, first),
        ).logits[0]
        for s, n in work:
            s.place.length += n
        for s, logits_V in zip(complete, logits_NV.float(), strict=False):
            if s.request.id in self.requests:
                self._extend(s, logits_V)

    def _extend(self, s: Sequence, logits_V: Tensor) -> None:
        """Choose the next token and tell what became certain."""
        if bool(logits_V.isnan().any()):
            self._fail(s.request, EngineError("The model's output is not a number; its weights are damaged."))
            return
        how = s.how.sampling
        token = choose(edit_logits(logits_V, how, s.counts), how, draw(how.seed, s.index, s.n_generated))
        s.tokens.append(token)
        s.counts[token] += how.edits_logits
        self.generated += 1
        if token in s.request.target.tokenizer.eos_ids:
            self._finish(s, "stop")
            return
        s.request.tokens[s.index].append(_report(s.request, token, logits_V))
        self._tell(s, s.text.push(token))
        if s.text.stopped:
            self._finish(s, "stop")
        elif len(s.tokens) >= s.end:
            self._finish(s, "length")

    def _finish(self, s: Sequence, reason: str) -> None:
        s.text.flush()
        s.tool_calls = parse_tool_calls(s.text.held) if s.text.hold else []
        self._tell(s, s.text.finish(drop_held=bool(s.tool_calls)))
        s.finish_reason = "tool_calls" if s.tool_calls else reason
        self._free(s)
        request = s.request
        if all(x.finish_reason for x in request.sequences):
            del self.requests[request.id]
            request.emit(_done(request))

    def _tell(self, s: Sequence, pieces: list[Piece]) -> None:
        reports = s.request.tokens[s.index]
        for piece in pieces:
            s.request.emit({"type": "token", "index": s.index, "text": piece.text, **reports[piece.position]})

    def _fail(self, request: Request, error: TunewrightError) -> None:
        self.abort(request.id)
        request.emit({"type": "error", "error": error.to_openai(), "status": error.status})

    def _free(self, s: Sequence) -> None:
        self.scheduler.remove(s)
        if s.cache is not None:
            with torch.inference_mode():  # an abort comes from outside a step, and others may have to move
                s.request.model.kv.close(s.cache)
            self.artefacts.release(s.request.model, s.request.target)
            s.cache = None


def encode(asked: GenerateRequest, target: Target) -> list[int]:
    """The request's input as token ids: the rendered chat, or the text as it stands. Raises UserError."""
    tokenizer = target.tokenizer
    if isinstance(asked.prompt, list):
        wrong = next((t for t in asked.prompt if not 0 <= t < tokenizer.vocab_size), None)
        if wrong is not None:
            raise UserError(
                f"'prompt' holds token {wrong}; ids go from 0 to {tokenizer.vocab_size - 1}.", param="prompt"
            )
        tokens = asked.prompt
    elif asked.prompt is not None:
        tokens, _ = tokenizer.encode(asked.prompt, add_special=True)
    else:
        tokens = tokenizer.encode_chat(asked.messages or [], asked.tools)
    if not tokens:
        raise UserError("The input has no tokens; give at least one character.", param="prompt")
    return tokens


def first_line(error: BaseException) -> str:
    """What an error says, without a stack trace."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def _route(work: list[tuple[Sequence, int]], first: dict[Sequence, int]) -> list[tuple[str, Tensor | None]]:
    """Which rows belong to which adapter; None when all rows are one adapter's."""
    rows: dict[str, list[int]] = {}
    for s, n in work:
        rows.setdefault(s.request.target.adapter_key, []).extend(range(first[s], first[s] + n))
    if len(rows) == 1:
        return [(key, None) for key in rows if key]
    return [(key, torch.tensor(at)) for key, at in rows.items() if key]


def _plan(work: list[tuple[Sequence, int]], first: dict[Sequence, int]) -> StepPlan:
    chunks = [Chunk(s.place, first[s], first[s] + n, s.place.length) for s, n in work if n > 1]
    by_pool: dict[int, list[Sequence]] = {}
    for s, n in work:
        if n == 1:
            by_pool.setdefault(id(s.place.pool), []).append(s)
    singles = []
    for members in by_pool.values():
        places = [(s.place.slot, first[s], s.place.length) for s in members]
        pool = members[0].place.pool
        rows_N = torch.zeros(len(pool.owners), dtype=torch.long)
        at_N = torch.zeros_like(rows_N)
        for slot, row, at in places:
            rows_N[slot], at_N[slot] = row, at
        slots_B = torch.tensor(sorted(slot for slot, _, _ in places))
        singles.append(Singles(pool, rows_N, at_N, slots_B, max(at for _, _, at in places) + 1))
    return StepPlan(singles, chunks)


def _report(request: Request, token: int, logits_V: Tensor) -> Event:
    """What the event of a token says besides its text."""
    top = request.asked.top_logprobs
    if top is None:
        return {"token_id": token}
    own, best = logprobs(logits_V, token, top)
    tokenizer = request.target.tokenizer
    return {
        "token_id": token,
        **_token_text(tokenizer, token),
        "logprob": own,
        "top_logprobs": [{**_token_text(tokenizer, t), "logprob": p} for t, p in best],
    }


def _token_text(tokenizer: Any, token: int) -> Event:
    text = tokenizer.decode([token], skip_special=False)
    return {"token": text, "bytes": token_bytes(tokenizer.token(token), text)}


def _done(request: Request) -> Event:
    completion = sum(s.n_generated for s in request.sequences)
    choices = []
    for s in request.sequences:
        choice: Event = {"index": s.index, "finish_reason": s.finish_reason, "text": s.text.shown}
        choices.append({**choice, "tool_calls": s.tool_calls} if s.tool_calls else choice)
    usage = {"prompt_tokens": request.n_prompt, "completion_tokens": completion}
    return {"type": "done", "choices": choices, "usage": {**usage, "total_tokens": request.n_prompt + completion}}
