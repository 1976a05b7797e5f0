"""From OpenAI's create request to our job spec, and what of it a job object shows again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunewright.api import reinforcement
from tunewright.api.requests import CreateJob, Hyper, Reinforcement, ReinforcementHyper
from tunewright.core import chain
from tunewright.core.errors import UserError, did_you_mean
from tunewright.core.run import Artefact
from tunewright.core.spec import KINDS, JobSpec, check_parts, parse_spec

# fields of the job spec that have their place in OpenAI's own request
ELSEWHERE = {
    "model": "model",
    "training_file": "training_file",
    "validation_file": "validation_file",
    "seed": "seed",
    "suffix": "suffix",
    "metadata": "metadata",
    "n_epochs": "method.<type>.hyperparameters (or hyperparameters)",
    "batch_size": "method.<type>.hyperparameters (or hyperparameters)",
    "learning_rate_multiplier": "method.<type>.hyperparameters (or hyperparameters)",
}
COMMON = ("n_epochs", "batch_size", "learning_rate_multiplier")


def build_spec(request: CreateJob, describe: Mapping[str, Any], start: Artefact | None = None) -> JobSpec:
    """The complete, checked spec of a request. Raises one UserError (SpecError) that lists what is wrong.

    start: what the job continues from; an adapter or delta goes on with its own tuner and options, unless the request
        differs.
    """
    own = dict(request.tunewright or {})
    check_own_keys(own)
    if start is not None and start.kind in ("adapter", "delta"):
        own["tuner"] = inherited(start.tuner, own.get("tuner"))
    hyper = hyperparameters(request)
    objective = _objective(request, own, hyper, describe)
    if isinstance(hyper, ReinforcementHyper):
        own = {**own, **reinforcement.fields(hyper, own)}
    raw = {
        **own,
        **({} if objective is None else {"objective": objective}),
        "model": request.model,
        "training_file": request.training_file,
        "validation_file": request.validation_file,
        "seed": request.seed,
        "suffix": request.suffix,
        "metadata": request.metadata,
        **{name: getattr(hyper, name) for name in COMMON},
    }
    return check_parts(parse_spec(raw), dict(describe))


def inherited(tuner: dict[str, Any], asked: Any) -> Any:
    """The asked tuner over the parent's options, if it is the same one."""
    wanted = {"name": asked} if isinstance(asked, str) else asked
    if wanted is None:
        return tuner
    same = isinstance(wanted, dict) and wanted.get("name") == tuner["name"]
    return {**tuner, **wanted} if same else asked


def hyperparameters(request: CreateJob) -> Hyper:
    """Those of `method` if it has any, else the old top-level ones, else all `auto`."""
    block = getattr(request.method, request.method.type) if request.method else None
    if block is not None:
        return block.hyperparameters
    return request.hyperparameters or Hyper()


def check_own_keys(own: dict[str, Any]) -> None:
    known = sorted({*JobSpec.model_fields, *chain.OWN} - set(ELSEWHERE))
    problems = []
    for key in own:
        if key in ELSEWHERE:
            problems.append((key, f"'tunewright.{key}' has its own place in the request: {ELSEWHERE[key]}."))
        elif key not in known:
            near = did_you_mean(key, known)
            text = f"Unrecognized request argument supplied: tunewright.{key}.{near} Known: {', '.join(known)}."
            problems.append((key, text))
    if problems:
        message = " ".join(text for _, text in problems)
        raise UserError(message, param=f"tunewright.{problems[0][0]}", code="unknown_parameter")


def _objective(request: CreateJob, own: dict[str, Any], hyper: Hyper, describe: Mapping[str, Any]) -> Any:
    """The objective's name and options: of `method`, or of `tunewright.objective`, which must not disagree; None where
    `tunewright.head` or the task decides."""
    asked = own.pop("objective", None)
    if request.method is None:
        return asked
    name = _of_method(request.method.type, describe)
    block = getattr(request.method, request.method.type)
    options = {k: v for k, v in hyper.model_dump().items() if k not in COMMON and v != "auto"}
    if isinstance(block, Reinforcement):
        options = reinforcement.options(block, describe["objective"][name]["defaults"])
    elif block is not None:
        options |= {k: v for k, v in block.model_dump(exclude={"hyperparameters"}).items() if v is not None}
    asked_part = {"name": asked} if isinstance(asked, str) else dict(asked or {})
    if asked_part.get("name", name) != name:
        raise UserError(
            f"method.type is '{request.method.type}' and tunewright.objective is '{asked_part['name']}'. Send one.",
            param="tunewright.objective",
        )
    return {**asked_part, "name": name, **options}


def _of_method(kind: str, describe: Mapping[str, Any]) -> str:
    """The objective that answers to OpenAI's method `kind`."""
    found = {row["card"].get("openai_method"): name for name, row in describe["objective"].items()}
    if kind not in found:
        have = ", ".join(f"'{m}'" for m in found if m)
        raise UserError(
            f"The method '{kind}' is not available on this server. It has: {have}.",
            param="method.type",
            code="method_not_available",
        )
    return found[kind]


def openai_method(objective: str, describe: Mapping[str, Any]) -> str | None:
    """The OpenAI method that an objective is, or None."""
    row = describe["objective"].get(objective)
    return row["card"].get("openai_method") if row else None


def method_object(request: CreateJob, spec: JobSpec, describe: Mapping[str, Any]) -> dict[str, Any] | None:
    """`method` as the job shows it; null when the objective is none of OpenAI's."""
    kind = openai_method(spec.objective.name, describe)
    if kind is None:
        return None
    block = getattr(request.method, kind) if request.method else None
    shown = block.model_dump(exclude_none=True) if block is not None else {"hyperparameters": shown_numbers(request)}
    return {"type": kind, kind: shown}


def shown_numbers(request: CreateJob) -> dict[str, Any]:
    """`hyperparameters` as the job shows it: always an object with the three common ones."""
    numbers = hyperparameters(request).model_dump()
    return {name: numbers[name] for name in COMMON}


def echo(request: CreateJob, spec: JobSpec) -> dict[str, Any]:
    """The `tunewright` object of the job: the four parts with their options, and every other field that was sent."""
    dumped = spec.model_dump(mode="json")
    return {name: dumped[name] for name in (*KINDS, *(request.tunewright or {}))}


def refuse_wandb(request: CreateJob) -> None:
    """Weights & Biases is not there yet: say which setting is missing rather than drop the request's wish."""
    if request.integrations:
        raise UserError(
            "The integration 'wandb' needs the setting WANDB_API_KEY, which this version of the server does not read "
            "yet. Leave 'integrations' out; the job's events and its step_metrics.csv have every number.",
            param="integrations",
            code="integration_not_configured",
        )
