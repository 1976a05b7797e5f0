"""OpenAI's `reinforcement` method as the options of our own objective, and what of it there is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunewright.api.requests import Reinforcement, ReinforcementHyper
from tunewright.core.errors import UserError
from tunewright.graders.base import Seams, nobody, parse_grader

WHERE = "method.reinforcement"
SMALLEST, LARGEST = 2, 128  # answers to a prompt


def options(block: Reinforcement, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The objective's options that the method decides. defaults: the objective's own. Raises UserError.

    compute_multiplier, how much is spent on exploring, multiplies the answers to each prompt.
    """
    hyper = block.hyperparameters
    if hyper.reasoning_effort != "default":
        raise UserError(
            f"reasoning_effort is '{hyper.reasoning_effort}', and the models here have no such setting. Leave it out; "
            "max_completion_tokens (tunewright.objective) says how long an answer may be.",
            param=f"{WHERE}.hyperparameters.reasoning_effort",
            code="unsupported_parameter",
        )
    if block.response_format is not None:
        raise UserError(
            "response_format is not available: answers are sampled freely. Leave it out, and let a grader read "
            "{{ sample.output_json }}, which is there when an answer is JSON.",
            param=f"{WHERE}.response_format",
            code="unsupported_parameter",
        )
    parse_grader(block.grader, None, f"{WHERE}.grader", Seams(ask=nobody)).close()
    found: dict[str, Any] = {"grader": block.grader}
    if hyper.compute_multiplier != "auto":
        answers = round(defaults["group_size"] * hyper.compute_multiplier)
        found["group_size"] = min(max(answers, SMALLEST), LARGEST)
    if hyper.eval_samples != "auto":
        found["eval_samples"] = hyper.eval_samples
    return found


def fields(hyper: ReinforcementHyper, own: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the job spec that the method decides. own: those of the `tunewright` object. Raises UserError."""
    if hyper.eval_interval == "auto":
        return {}
    if "eval_every" in own:
        raise UserError(
            f"{WHERE}.hyperparameters.eval_interval and tunewright.eval_every say the same. Send one of them.",
            param="tunewright.eval_every",
        )
    return {"eval_every": hyper.eval_interval}
