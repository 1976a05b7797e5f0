"""The engine: requests in, events out, one step at a time. Continuous batching of any mix of models and adapters.

A step computes, for each loaded model, ONE packed row: the next token of every running answer and a bounded piece of
new prompts. Nothing is padded, and adapters over one base share that row. One thread owns an Engine.

Events of a request, as dicts: {"type": "start", "prompt_tokens"}, then {"type": "token", "index", "text", "token_id",
and with logprobs "token", "bytes", "logprob", "top_logprobs"}, then {"type": "done", "choices", "usage", of a recipe
that has something to tell also "extra": {"contexts", "proposals"}} or {"type": "error", "error"}.
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
from tunewright.engine.follow import Followed, Recipes
from tunewright.engine.mixing import Mixing
from tunewright.engine.reports import done, report
from tunewright.engine.request import GenerateRequest, Settled, encode, settle
from tunewright.engine.rows import RowModels
from tunewright.engine.sampler import add_logits, choose, draw, edit_logits
from tunewright.engine.scheduler import Limits, Scheduler, Sequence
from tunewright.engine.step_plan import plan_of, route
from tunewright.engine.text import Piece, TextStream
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
    """A request in progress. tokens: what there is to report of each generated token, by choice.

    notes: what its answer tells of how it was made.
    """

    id: int
    asked: GenerateRequest
    target: Target
    emit: Emit
    n_prompt: int
    sequences: list[Sequence] = field(default_factory=list)
    tokens: list[list[Event]] = field(default_factory=list)
    notes: Event = field(default_factory=dict)


class Engine:
    """home: the data folder. dtype: auto, float32 or bfloat16. threads: CPU threads, or auto for all.

    artefacts: what answers, where it is not the models of the data folder (engine/held.py).
    """

    def __init__(
        self,
        home: Home,
        dtype: str = "auto",
        threads: int | str = "auto",
        limits: Limits | None = None,
        artefacts: Artefacts | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.dtype = choose_dtype(dtype)
        self.set_threads(threads)
        self.artefacts = artefacts or Artefacts(home, self.dtype, self.limits)
        self.recipes = Recipes(self.artefacts)
        self.rows = RowModels(home, self.dtype, self.limits.max_models)
        self.scheduler = Scheduler(self.limits)
        self.requests: dict[int, Request] = {}
        self.mixing: dict[int, Mixing] = {}
        self._numbers = itertools.count(1)
        self.generated = 0

    def set_threads(self, threads: int | str) -> None:
        """Takes effect for the thread that calls it, which must be the one that calls step()."""
        self.threads = set_threads(threads)

    def add_request(self, asked: GenerateRequest, emit: Emit, above: tuple[str, ...] = ()) -> int:
        """Queue a request; returns its number. `emit` gets its events, from within this call and step().

        above: recipes that led to this request. Raises UserError (a bad prompt or template; context_length_exceeded),
        ModelNotFound, Busy (the queue is full).
        """
        folder = self.rows.find(asked.base, asked.artefact)
        if folder is not None:
            self.rows.say(folder, asked, emit)
            return next(self._numbers)
        found = self.recipes.follow(asked, above)
        return self._queue(found, emit) if found.mixture is None else self._mix(found, emit)

    def _queue(self, found: Followed, emit: Emit) -> int:
        asked, targets = found.asked, [target for target, _ in found.parts]
        target, context = targets[0], min(t.context - t.virtual for t in targets)
        self._check_fits(targets)
        tokens = encode(asked, target.tokenizer)
        how = settle(asked, target.decoding)
        room = context - len(tokens)
        if room < 1:
            added = " What the recipe puts in front of them counts, too." if found.above else ""
            raise UserError(
                f"This model's maximum context length is {context} tokens. However, your input has "
                f"{len(tokens)} tokens and leaves no room for an answer. Please shorten the messages.{added}",
                code="context_length_exceeded",
                param="messages" if asked.messages is not None else "prompt",
            )
        end = len(tokens) + min(room, how.max_tokens or room)
        request = Request(next(self._numbers), asked, target, emit, len(tokens), notes=found.notes)
        for index in range(asked.n):
            request.sequences.append(_leader(request, index, list(tokens), end, how, found.parts))
            request.tokens.append([])
        self.scheduler.add(request.sequences)
        self.requests[request.id] = request
        emit({"type": "start", "prompt_tokens": len(tokens)})
        return request.id

    def _check_fits(self, targets: list[Target]) -> None:
        n = len({t.key for t in targets})
        if n > self.limits.max_models:
            raise UserError(f"This recipe needs {n} models at once, and at most {self.limits.max_models} stay loaded.")

    def _mix(self, found: Followed, emit: Emit) -> int:
        """Begin a mixture of agents: a number of its own, and requests below it."""
        assert found.mixture is not None
        number = next(self._numbers)

        def tell(event: Event) -> None:
            if event["type"] in ("done", "error"):
                self.mixing.pop(number, None)
            emit(event)

        def add(asked: GenerateRequest, emit: Emit) -> int:
            return self.add_request(asked, emit, found.above)

        mixing = Mixing(found.asked, found.mixture, tell, add, self.abort, _guard, dict(found.notes))
        self.mixing[number] = mixing
        try:
            mixing.begin()
        except BaseException:
            self.abort(number)
            raise
        return number

    def abort(self, number: int) -> None:
        """Drop a request and free what it holds; an unknown or finished one is nothing to do. Emits nothing."""
        mixing = self.mixing.pop(number, None)
        if mixing is not None:
            mixing.stop()
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
        if folder is None:
            self.recipes.clear()
        return self.artefacts.unload(folder) + self.rows.unload(folder)

    def step(self) -> bool:
        """Advance every running answer by one token. Returns whether there is more to do."""
        with torch.inference_mode():
            self.scheduler.admit(self._start)
            self._share_prompts()
            work: dict[Model, list[tuple[Sequence, int]]] = {}
            for sequence, n in self.scheduler.plan():
                work.setdefault(sequence.model, []).append((sequence, n))
            for model, planned in work.items():
                part = [(s, n) for s, n in planned if s.cache is not None]  # others of its team may have failed
                if not part:
                    continue
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
            "models": [*(key.split("@")[0] for key in models), *self.rows.names()],
            "adapters": [key.split("@")[0] for m in models.values() for key in m.adapters],
            "kv_bytes": sum(m.kv.bytes for m in models.values()),
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": self.threads,
        }

    def _share_prompts(self) -> None:
        """Give each choice that has just started the keys and values of its request's prompt, if another choice has
        computed them; if one is at it, let it wait for that. The last token stays to be computed, for its logits."""
        for s in self.scheduler.running:
            if not s.shares or s.n_done or s.n_prompt < 2:
                continue
            others = [x for x in s.request.sequences if x is not s and x.cache is not None]
            ready = next((x for x in others if x.n_done >= s.n_prompt - 1), None)
            s.waits = ready is None and any(x.index < s.index for x in others)
            if ready is not None:
                s.model.kv.copy(ready.place, s.place, s.virtual + s.n_prompt - 1)

    def _start(self, sequence: Sequence) -> bool:
        """Load what the sequence and its helpers need; if not all of it can be, nothing is held."""
        request = sequence.request
        try:
            ready = all(self._acquire(s) for s in sequence.team)
        except TunewrightError as e:
            self._fail(request, e)
            return True
        except FAILURES as e:
            log.exception("loading failed")
            self._fail(request, EngineError(f"The model could not be loaded: {first_line(e)}"))
            return True
        if not ready:
            for s in sequence.team:
                self._release(s)
        return ready

    def _acquire(self, s: Sequence) -> bool:
        model = self.artefacts.acquire(s.target)
        if model is not None:
            s.model, s.cache = model, model.kv.open(s.virtual + min(len(s.tokens) + 32, s.end))
            model.kv.put(s.cache, model.prefixes.get(s.target.adapter_key, ()))
        return model is not None

    def _release(self, s: Sequence) -> None:
        if s.cache is not None:
            with torch.inference_mode():  # an abort comes from outside a step, and others may have to move
                s.model.kv.close(s.cache)
            self.artefacts.release(s.model, s.target)
            s.cache = s.logits = None

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
        model.routing.parts = route(work, first)
        net: Any = model.net
        device = next(net.parameters()).device
        logits_NV = net(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(keep or [0], device=device),
            kv=plan_of(work, first, device),
        ).logits[0]
        for s, n in work:
            s.place.length += n
        for s, logits_V in zip(complete, logits_NV.float().cpu(), strict=False):
            if s.request.id in self.requests:
                self._hear(s, logits_V)

    def _hear(self, s: Sequence, logits_V: Tensor) -> None:
        """Take one model's logits; once all models of an answer have spoken, its next token is chosen."""
        leader = s.leader or s
        if not leader.helpers:
            self._extend(leader, logits_V)
            return
        s.logits = logits_V
        if all(x.logits is not None for x in leader.team):
            total_V = add_logits([(x.logits, x.weight) for x in leader.team])
            for x in leader.team:
                x.logits = None
            self._extend(leader, total_V)

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
        s.request.tokens[s.index].append(
            report(s.request.target.tokenizer, token, logits_V, s.request.asked.top_logprobs)
        )
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
            request.emit(done(request.sequences, request.n_prompt, request.notes))

    def _tell(self, s: Sequence, pieces: list[Piece]) -> None:
        reports = s.request.tokens[s.index]
        for piece in pieces:
            s.request.emit({"type": "token", "index": s.index, "text": piece.text, **reports[piece.position]})

    def _fail(self, request: Request, error: TunewrightError) -> None:
        self.abort(request.id)
        request.emit({"type": "error", "error": error.to_openai(), "status": error.status})

    def _free(self, leader: Sequence) -> None:
        for s in leader.team:
            self.scheduler.remove(s)
            self._release(s)


def _leader(
    request: Request, index: int, tokens: list[int], end: int, how: Settled, parts: list[tuple[Target, float]]
) -> Sequence:
    """The sequence of a choice, with a helper for each further model whose logits it needs."""
    text = TextStream(request.target.tokenizer.decode, how.stop, MARK if request.asked.tools else "")
    own = (request, index, tokens, len(tokens), end, how, text)
    team = [Sequence(*own, virtual=t.virtual, target=t, weight=weight) for t, weight in parts]
    team[0].helpers = team[1:]
    team[0].shares = len(team) == 1 and request.asked.n > 1
    for helper in team[1:]:
        helper.leader = team[0]
    return team[0]


def _guard(work: Callable[[], None], fail: Callable[[TunewrightError], None]) -> None:
    """Do work inside another request's step: what goes wrong must not become that one's failure."""
    try:
        work()
    except TunewrightError as e:
        fail(e)
    except FAILURES as e:
        log.exception("a recipe failed")
        fail(EngineError(f"The recipe failed: {first_line(e)}"))


def first_line(error: BaseException) -> str:
    """What an error says, without a stack trace."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
