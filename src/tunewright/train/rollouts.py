"""Rollouts: a step's prompts are answered by the model as it is, the answers graded, and each made an example to train.

Sampling runs in the engine, over the training model itself. A draw depends on (seed, step, row, answer, position), so
every attempt draws the same; and what was graded is committed (train/samples.py) before the step trains on it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from threading import Event
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tunewright.core.errors import Interrupted, SpecError
from tunewright.core.events import EventWriter
from tunewright.core.example import Example, Group
from tunewright.core.home import Home
from tunewright.data.rendered import SQUARES, SUPERVISED, TOKENS, Groups, sizes
from tunewright.data.tokenizer import Tokenizer
from tunewright.engine.engine import EngineError
from tunewright.engine.held import NAME, engine_over, serving
from tunewright.engine.request import MAX_ROWS, AskedRow, GenerateRequest, RowsRequest
from tunewright.engine.rows import RowModels
from tunewright.engine.scheduler import Limits
from tunewright.graders.base import Grade, Grader, Sample
from tunewright.models.layouts import PACKED
from tunewright.models.policy import Policy
from tunewright.objectives.rollouts import Numbers, OverRollouts, Rolled
from tunewright.ops import segments
from tunewright.ops.packing import pack
from tunewright.ops.runtime import derive_seed
from tunewright.ops.types import Batch
from tunewright.train.plan import Plan, micro_tokens
from tunewright.train.samples import Line, Samples
from tunewright.tuners.base import Tuner

AT_ONCE = 32  # answers that are computed at the same time
GRADED_AT_ONCE = 8
POLL = 0.5  # seconds, in which somebody may have asked to stop
SAME = 1e-8  # rewards that differ by less are equal
PROBED = (2, 6)  # tokens of an answer, to tell what each further one takes


@dataclass(frozen=True)
class Answer:
    """tokens: with the end token, if it came to one (`finish` is then `stop`, else `length`)."""

    tokens: tuple[int, ...]
    text: str
    finish: str


Graded = list[tuple[Answer, Grade]]


class Judge(Protocol):
    """Who gives the rewards. close: ends what it keeps running."""

    def grades(self, pairs: Sequence[tuple[Example, Answer]]) -> list[Grade]:
        """A grade for each prompt and answer, in order."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Rollout:
    """A step's. groups: those that have something to say, to be trained in so many updates. figures: of all of
    them, for charts."""

    groups: list[Group]
    figures: dict[str, float]
    updates: int


@dataclass
class Rollouts:
    """Answers and grades for one job. context: tokens of a prompt and its answer together."""

    objective: OverRollouts
    policy: Policy
    tokenizer: Tokenizer
    judge: Judge
    samples: Samples
    home: Home
    context: int
    events: EventWriter
    stop: Callable[[], bool]
    _told: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        limits = Limits(max_running=AT_ONCE, max_waiting=1 << 20)
        held = (self.policy.model, self.tokenizer, self.context, self.home, limits)
        self._engine = engine_over(*held, fast=self.policy.fast)

    def close(self) -> None:
        self.judge.close()

    def roll(self, step: int, prompts: Sequence[Group], plan: Plan) -> Rollout:
        """Answer, grade and commit a step's prompts, or read what an earlier attempt committed.

        Raises Interrupted when asked to stop meanwhile, EndpointDown when a judge stays away.
        """
        n, rollbacks = self.objective.n_answers, sum(r["to"] < step for r in plan.rollbacks)
        asked = [g.examples[0] for g in prompts]
        lines = self.samples.of_step(step, rollbacks)
        if lines is None:
            graded = self._graded(asked, n, plan.seed, ("rollout", step))
        else:
            graded = [[read(line) for line in lines[i * n : (i + 1) * n]] for i in range(len(asked))]
        groups = [group_of(prompt, [answer for answer, _ in own]) for prompt, own in zip(asked, graded, strict=True)]
        numbers = self._credit(groups, graded, micro_tokens(plan, step - 1, "valid"))
        if lines is None:
            self.samples.append(self._lines(asked, graded, numbers, {"step": step, "role": "train"}, rollbacks))
        live = [not self.objective.compares or differ(own) for own in graded]
        ready = [with_numbers(g, own) for g, own, alive in zip(groups, numbers, live, strict=True) if alive]
        shown = figures(graded) | {"dead_share": 1 - sum(live) / len(live)}
        return Rollout(ready, shown, self.objective.options.updates)

    def evaluate(self, step: int, prompts: Sequence[Group], plan: Plan) -> dict[str, float]:
        """The figures of answers to validation prompts. Raises like roll()."""
        asked = [g.examples[0] for g in prompts]
        graded = self._graded(asked, self.objective.options.eval_samples, plan.seed, ("validation", step))
        self.samples.append(self._lines(asked, graded, None, {"step": step, "role": "valid"}, len(plan.rollbacks)))
        return figures(graded)

    def seconds(self, prompts: Sequence[Group], plan: Plan) -> float:
        """What a step's sampling takes at most, from its first tokens."""
        asked, most = [g.examples[0] for g in prompts], self.objective.options.max_completion_tokens
        took = []
        for tokens in PROBED:
            started = time.monotonic()
            self._sample(asked, self.objective.n_answers, plan.seed, ("probe",), min(tokens, most))
            took.append(time.monotonic() - started)
        each = max(took[1] - took[0], 0.0) / (PROBED[1] - PROBED[0])
        return took[0] + each * max(most - PROBED[0], 0)

    def _graded(self, asked: Sequence[Example], n: int, seed: int, key: tuple[Any, ...]) -> list[Graded]:
        answers = self._sample(asked, n, seed, key, self.objective.options.max_completion_tokens)
        pairs = [(prompt, answer) for prompt, own in zip(asked, answers, strict=True) for answer in own]
        grades = self.judge.grades(pairs)
        self._tell(grades)
        graded = list(zip((answer for _, answer in pairs), grades, strict=True))
        return [graded[i * n : (i + 1) * n] for i in range(len(asked))]

    def _sample(
        self, asked: Sequence[Example], n: int, seed: int, key: tuple[Any, ...], most: int
    ) -> list[list[Answer]]:
        """n answers to each prompt, sampled from the present weights."""
        engine, failed, waiting = self._engine, [], []
        how = {"base": NAME, "n": n, "max_tokens": most, "temperature": self.objective.options.temperature}
        with self.policy.computing(), serving(self.policy.model):
            for prompt in asked:
                own = {"prompt": list(prompt.ids), "seed": derive_seed(*key, seed, prompt.source)}
                request = GenerateRequest.model_validate({**how, **own})
                number = engine.add_request(request, lambda e: failed.append(e) if e["type"] == "error" else None)
                waiting.append((number, engine.requests[number]))
            while engine.step() and not failed:
                if self.stop():
                    for number, _ in waiting:
                        engine.abort(number)
                    raise Interrupted("Stopped while the model answered the step's prompts, which will be asked again.")
        if failed:
            raise EngineError(failed[0]["error"]["message"])
        return [
            [Answer(tuple(s.tokens[s.n_prompt :]), s.text.shown, s.finish_reason or "length") for s in r.sequences]
            for _, r in waiting
        ]

    def _credit(self, groups: Sequence[Group], graded: Sequence[Graded], tokens: int) -> list[list[Numbers]]:
        """What each token of each answer is worth to the objective."""
        looks = self.objective.looks
        seen = look(self.policy, self.objective, groups, tokens) if looks else {}
        rolled = [
            [
                Rolled(grade.reward, len(answer.tokens), **{k: seen[i, j][k] for k in looks})
                for j, (answer, grade) in enumerate(own)
            ]
            for i, own in enumerate(graded)
        ]
        return self.objective.credit(rolled)

    def _lines(
        self,
        asked: Sequence[Example],
        graded: Sequence[Graded],
        numbers: Sequence[Sequence[Numbers]] | None,
        about: Line,
        rollbacks: int,
    ) -> list[Line]:
        out = []
        for i, (prompt, own) in enumerate(zip(asked, graded, strict=True)):
            text = self.tokenizer.decode(list(prompt.ids), skip_special=False)
            for j, (answer, grade) in enumerate(own):
                worth = None if numbers is None else float(numbers[i][j]["advantage"].mean())
                where = {**about, "rollbacks": rollbacks, "row": prompt.source, "sample": j}
                out.append({**where, "prompt": text, **written(answer, grade), "advantage": worth})
        return out

    def _tell(self, grades: Sequence[Grade]) -> None:
        """Say once an attempt that answers could not be graded, and why."""
        bad = [g for g in grades if not g.ok]
        if bad and not self._told:
            self._told = True
            text = f"{len(bad)} of {len(grades)} answers could not be graded and count as 0: {bad[0].why}"
            self.events.write("message", text, {"errors": bad[0].errors}, "warn")


def refuse(policy: Policy, tuner: Tuner) -> None:
    """Raise SpecError for what cannot be sampled from while it is trained."""
    if policy.layout != PACKED:
        raise SpecError(
            "This model runs padded, and the engine that samples answers runs packed models only. Use objective: dpo "
            "or kto, or another model.",
            param="objective",
        )
    if tuner.n_virtual or tuner.card.needs_data:
        what = "puts a soft prompt before every row" if tuner.n_virtual else "chooses what is trained by given answers"
        raise SpecError(
            f"The tuner {what}, which does not go with answers that the model samples itself. Use lora or full.",
            param="tuner",
        )


class ByGrader:
    """Grades from a grader, several answers at a time. halt: set, its waiting for a judge ends."""

    def __init__(self, grader: Grader, halt: Event, stop: Callable[[], bool]) -> None:
        self.grader, self.close = grader, grader.close
        self.halt, self.stop = halt, stop

    def grades(self, pairs: Sequence[tuple[Example, Answer]]) -> list[Grade]:
        """Raises Interrupted when asked to stop meanwhile, and does not wait for a judge then; EndpointDown."""
        pool = ThreadPoolExecutor(GRADED_AT_ONCE)
        try:
            waiting = [pool.submit(self._grade, pair) for pair in pairs]
            return [self._when_done(future) for future in waiting]
        except BaseException:
            self.halt.set()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _when_done(self, future: Future[Grade]) -> Grade:
        while True:
            try:
                return future.result(POLL)
            except NotYet:
                if self.stop():
                    text = "Stopped while the step's answers were graded, which will be sampled and graded again."
                    raise Interrupted(text) from None

    def _grade(self, pair: tuple[Example, Answer]) -> Grade:
        prompt, answer = pair
        return self.grader.grade(json.loads(prompt.item or "{}"), Sample(answer.text))


class ByRewardModel:
    """Grades from the reward model in a folder. Raises UserError for a conversation that it cannot read."""

    def __init__(self, models: RowModels, folder: Path) -> None:
        self.models, self.folder = models, str(folder)
        models.open(folder)  # now, because the preflight counts what is held

    def grades(self, pairs: Sequence[tuple[Example, Answer]]) -> list[Grade]:
        rows = [asked_row(prompt, answer) for prompt, answer in pairs]
        parts = (rows[at : at + MAX_ROWS] for at in range(0, len(rows), MAX_ROWS))
        asked = (RowsRequest(artefact=self.folder, rows=part) for part in parts)
        return [Grade(found["score"]) for one in asked for found in self.models.judge(one)["results"]]

    def close(self) -> None:
        self.models.unload()


def asked_row(prompt: Example, answer: Answer) -> AskedRow:
    """The conversation that a reward model reads."""
    item = json.loads(prompt.item or "{}")
    before = item.get("messages") or item.get("prompt") or ""
    messages = [{"role": "user", "content": before}] if isinstance(before, str) else before
    return AskedRow(messages=[*messages, {"role": "assistant", "content": answer.text}])


def fields_of(groups: Sequence[Group]) -> list[str]:
    """What graders may know of these rows: the fields that any of them has."""
    return sorted({name for g in groups for name in json.loads(g.examples[0].item or "{}")})


def group_of(prompt: Example, answers: Sequence[Answer]) -> Group:
    """A prompt with its answers, every token of which is trained."""
    made = (
        Example(prompt.ids + a.tokens, (0.0,) * len(prompt.ids) + (1.0,) * len(a.tokens), prompt.source)
        for a in answers
    )
    return Group(tuple(made), prefix=len(prompt.ids))


def with_numbers(group: Group, numbers: Sequence[Numbers]) -> Group:
    """The group with what is known of its answers' tokens."""
    before = (0.0,) * group.prefix
    made = (
        replace(e, per_token={name: before + tuple(values.tolist()) for name, values in own.items()})
        for e, own in zip(group.examples, numbers, strict=True)
    )
    return replace(group, examples=tuple(made))


def differ(graded: Graded) -> bool:
    """Whether a group's rewards say that one answer is better than another."""
    rewards = [grade.reward for _, grade in graded]
    return max(rewards) - min(rewards) > SAME


def figures(graded: Iterable[Graded]) -> dict[str, float]:
    """What charts show of rollouts, in OpenAI's words where there are any."""
    pairs = [pair for own in graded for pair in own]
    names = sorted({name for _, grade in pairs for name in grade.sub_rewards})
    return {
        "mean_reward": fmean(grade.reward for _, grade in pairs),
        "mean_parse_error": fmean(not grade.ok for _, grade in pairs),
        "completion_tokens_mean": fmean(len(answer.tokens) for answer, _ in pairs),
        "cut_share": fmean(answer.finish == "length" for answer, _ in pairs),
        **{f"reward_{name}": fmean(grade.sub_rewards.get(name, 0.0) for _, grade in pairs) for name in names},
    }


def written(answer: Answer, grade: Grade) -> Line:
    """An answer and its grade as a line of samples.jsonl has them."""
    return {
        "text": answer.text,
        "tokens": list(answer.tokens),
        "n_tokens": len(answer.tokens),
        "finish": answer.finish,
        "reward": grade.reward,
        "grades": grade.sub_rewards,
        "errors": grade.errors,
        "why": grade.why,
    }


def read(line: Line) -> tuple[Answer, Grade]:
    """The same back."""
    answer = Answer(tuple(line["tokens"]), line["text"], line["finish"])
    return answer, Grade(line["reward"], errors=line["errors"], sub_rewards=line["grades"], why=line["why"])


@torch.no_grad()
def look(
    policy: Policy, objective: Any, groups: Sequence[Group], tokens: int
) -> dict[tuple[int, int], dict[str, Tensor]]:
    """{(group, answer): what objective.looks names, [n] float64 each}, before the step's first update."""
    numbered = [replace(g, examples=tuple(replace(e, source=i) for e in g.examples)) for i, g in enumerate(groups)]
    found: dict[tuple[int, int], dict[str, Tensor]] = {}
    for batch in pack(numbered, tokens, share=policy.shares_prefixes):
        on = batch.to(policy.device)
        seen = {}
        if "reference" in objective.looks:
            seen["reference"] = objective.reference.token_stats(on, {"logp"})["logp"]
        seen |= policy.token_stats(on, {"logp"}, objective.value_head if "value" in objective.looks else None)
        for s, place in zip(segments.examples(batch).tolist(), segments.places(batch).tolist(), strict=True):
            found[int(batch.source_S[s]), place] = {k: of_answer(x, batch, s) for k, x in seen.items()}
    return found


def of_answer(values_T: Tensor, batch: Batch, s: int) -> Tensor:
    """[n] float64: the values at the tokens of segment s that are trained."""
    part = slice(int(batch.cu_seqlens[s]), int(batch.cu_seqlens[s + 1]))
    return values_T[part].cpu().double()[batch.weights_T[part] > 0]


class Imagined(Groups):
    """Prompts with answers of the greatest length, as the preflight and the plan need them before there are any."""

    def __init__(self, prompts: Sequence[Group], objective: OverRollouts) -> None:
        self._prompts, self._n = prompts, objective.n_answers
        self._most, self._names = objective.options.max_completion_tokens, objective.numbers
        whole = sizes(prompts)[:, TOKENS] + self._most
        self.sizes = np.empty((len(prompts), 3), np.int64)
        self.sizes[:, TOKENS], self.sizes[:, SQUARES] = self._n * whole, self._n * whole**2
        self.sizes[:, SUPERVISED] = self._n * self._most

    def __len__(self) -> int:
        return len(self._prompts)

    def _at(self, i: int) -> Group:
        prompt = self._prompts[i].examples[0]
        tokens = (prompt.ids * (self._most // len(prompt.ids) + 1))[: self._most]
        group = group_of(prompt, [Answer(tokens, "", "length")] * self._n)
        sides = (torch.full((self._most,), 1.0 if k % 2 else -1.0) for k in range(self._n))
        return with_numbers(group, [dict.fromkeys(self._names, values) for values in sides])
