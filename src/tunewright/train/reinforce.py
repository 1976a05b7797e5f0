"""What a job over rollouts adds to the parts of any other: who grades, and what the preflight is shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tunewright.core.errors import SpecError
from tunewright.core.events import EventWriter
from tunewright.core.example import Group
from tunewright.core.home import Home
from tunewright.core.run import Run, read_artefact
from tunewright.data.tokenizer import Tokenizer
from tunewright.engine.rows import RowModels
from tunewright.graders.base import Seams, parse_grader
from tunewright.models.policy import Policy
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
    events: EventWriter,
    stop: Callable[[], bool],
) -> Rollouts:
    """Raises SpecError for a tuner or model that cannot be sampled from, or a grader that does not fit the rows."""
    refuse(policy, tuner)
    judge = judge_of(run, home, objective, policy, prompts)
    return Rollouts(objective, policy, tokenizer, judge, Samples(run.folder), home, context, events, stop)


def judge_of(run: Run, home: Home, objective: Any, policy: Policy, prompts: Sequence[Group]) -> Judge:
    """Who gives the rewards: a grader, or the reward model that lies in the run folder. Raises SpecError."""
    if objective.options.grader is not None and getattr(objective.options, "reward_model", None):
        raise SpecError("Rewards come from a grader or from a reward model; give one of them.", param="objective")
    if objective.options.grader is not None:
        seams = Seams(cache=home.cache / "answers")
        return ByGrader(parse_grader(objective.options.grader, fields_of(prompts), "objective.grader", seams))
    job, dtype = run.job(), next(policy.model.parameters()).dtype
    folder = run.folder / job.teacher.get("over", "")
    head = read_artefact(folder).head if "over" in job.teacher else "lm"
    if head != "reward":
        raise SpecError(
            f"'{objective.options.reward_model}' is no reward model. Train one first, with objective: reward, and name "
            "its ft: model.",
            param="objective",
        )
    return ByRewardModel(RowModels(home, dtype, kept=1), folder)


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
