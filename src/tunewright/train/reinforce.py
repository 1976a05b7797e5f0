"""What a job over rollouts adds to the parts of any other: who grades, and what the preflight is shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Event
from typing import Any

from tunewright.core.errors import SpecError
from tunewright.core.events import EventWriter
from tunewright.core.example import Group
from tunewright.core.home import Home
from tunewright.core.run import Run
from tunewright.data.tokenizer import Tokenizer
from tunewright.engine.rows import RowModels
from tunewright.graders.base import Seams, parse_grader
from tunewright.models.policy import Policy
from tunewright.train.candidates import engine_of, place_of
from tunewright.train.finish import Start
from tunewright.train.judging import for_graders
from tunewright.train.loop import Parts
from tunewright.train.plan import Plan, step_rows
from tunewright.train.rollouts import ByGrader, ByRewardModel, Imagined, Judge, Rollouts, fields_of, refuse
from tunewright.train.samples import Samples
from tunewright.tuners.base import Tuner

LEAST_PROMPT = 8  # tokens


def prompt_limit(objective: Any, limit: int) -> int:
    """Tokens that a prompt may have, of `limit` for it and its answer. Raises SpecError if too few are left."""
    most = objective.options.max_completion_tokens
    if limit - most < LEAST_PROMPT:
        raise SpecError(
            f"max_completion_tokens is {most}, and a prompt and its answer may have {limit} tokens together; allowed "
            f"here: 1 to {limit - LEAST_PROMPT}.",
            param="objective",
        )
    return limit - most


def rollouts_of(
    run: Run,
    home: Home,
    objective: Any,
    policy: Policy,
    tuner: Tuner,
    tokenizer: Tokenizer,
    prompts: Sequence[Group],
    context: int,
    other: Start | None,
    events: EventWriter,
    stop: Callable[[], bool],
) -> Rollouts:
    """other: the reward model, or the judge of the grader, if it is a model of this machine.

    Raises SpecError for a tuner or model that cannot be sampled from, or a grader that does not fit the rows.
    """
    refuse(policy, tuner)
    judge = judge_of(run, home, objective, policy, prompts, other, stop)
    return Rollouts(objective, policy, tokenizer, judge, Samples(run.folder), home, context, events, stop)


def judge_of(
    run: Run,
    home: Home,
    objective: Any,
    policy: Policy,
    prompts: Sequence[Group],
    other: Start | None,
    stop: Callable[[], bool],
) -> Judge:
    """Who gives the rewards: a grader, or the reward model that lies in the run folder. Raises SpecError.

    A model is loaded now, because the preflight counts what is held.
    """
    job, spec = run.job(), objective.options.grader
    if spec is None:
        dtype = next(policy.model.parameters()).dtype
        return ByRewardModel(RowModels(home, dtype, kept=1), run.folder / job.teacher["over"])
    ask, halt = None, Event()
    if other is not None:
        engine, place = engine_of(home, job.spec.dtype), place_of(run, job.teacher["base"], other, "judge")
        engine.load(place.get("base"), place.get("artefact"))
        ask = for_graders(engine, place)
    seams = Seams(ask=ask, cache=home.cache / "answers", halt=halt)
    return ByGrader(parse_grader(spec, fields_of(prompts), "objective.grader", seams), halt, stop)


def imagined(parts: Parts) -> Parts:
    """The parts as the preflight measures them: prompts with answers of the greatest length."""
    assert parts.rollouts is not None
    return replace(parts, groups=Imagined(parts.groups, parts.rollouts.objective), valid=(), rollouts=None)


def with_sampling(plan: Plan, parts: Parts) -> Plan:
    """The plan that the preflight made of imagined(parts), with the time that the sampling takes at most."""
    assert parts.rollouts is not None
    prompts = [parts.groups[i] for i in step_rows(plan, 1)]
    seconds = parts.rollouts.seconds(prompts, plan)
    more = seconds * plan.total_steps
    return replace(
        plan,
        base={},
        seconds_per_step=plan.seconds_per_step + seconds,
        predicted_seconds=plan.predicted_seconds + more,
        predicted_finish=plan.predicted_finish + more,
    )
