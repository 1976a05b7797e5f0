"""Chains: job specs of which a later one names an earlier one's result as `stage:NAME`. RLHF is a chain with a name.

    model: smollm2-135m-instruct
    training_file: texts.jsonl            # model and files beside `stages` are the first stage's,
    tuner: {name: lora, r: 32}            # every other field is every stage's where it says nothing else
    stages:
      - {name: domain, objective: pretrain}
      - {name: answers, training_file: chats.jsonl}
      - {name: preferences, training_file: pairs.jsonl, objective: dpo}

Without a `model` a stage goes on from the one before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import copy
from typing import Any, TypeVar

from tunewright.core.errors import SpecError, UserError, did_you_mean
from tunewright.core.spec import HEADS, KINDS, LISTS, JobSpec, Part, check_parts, extra_files, parse_spec

FIRST = ("model", "training_file", "validation_file")  # beside `stages` they are the first stage's
OWN = ("stages", "chain")
MOST = 16
NAME = re.compile(r"[A-Za-z0-9._-]{1,32}")
PREFIX = "stage:"
# an option that names a model -> the head that this model must have
HEAD_OF = {"reward_model": "reward"}
# what `chain: NAME` knows of its stages, in their order; the job's own `stages` are laid over it
CHAINS: dict[str, dict[str, dict[str, Any]]] = {
    # Ouyang et al. 2022, arXiv 2203.02155: the reward model, too, starts from the supervised one
    "rlhf": {
        "sft": {"objective": "sft"},
        "reward": {"objective": "reward", "model": "stage:sft"},
        "ppo": {"objective": {"name": "ppo", "reward_model": "stage:reward"}, "model": "stage:sft"},
    },
}
Stages = dict[str, JobSpec]
Wrong = TypeVar("Wrong", bound=UserError)


def is_chain(raw: Any) -> bool:
    """Whether plain data is meant as a chain rather than as one job."""
    return isinstance(raw, dict) and any(key in raw for key in OWN)


def parse_chain(raw: Any) -> Stages:
    """{stage's name: its spec}, in order, from plain data. Raises one SpecError that lists everything wrong.

    A reference to another stage is still `stage:NAME` in the specs.
    """
    listed = expand(raw)
    common = {k: v for k, v in raw.items() if k not in (*OWN, *FIRST)}
    found: Stages = {}
    problems = []
    for i, (name, fields) in enumerate(listed.items()):
        start = {k: raw[k] for k in FIRST if k in raw} if i == 0 else {"model": PREFIX + list(listed)[i - 1]}
        try:
            found[name] = parse_spec({**common, **start, **fields, "suffix": _suffix(name, fields, common)})
        except SpecError as e:
            problems.append(in_stage(name, e).message)
    problems += _bad_references(found, list(listed))
    if problems:
        raise SpecError(" ".join(problems), param="stages")
    return found


def expand(raw: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{stage's name: its own fields}, in order: those of `stages`, laid over what `chain` knows. Raises SpecError.

    `stages` is a list of objects with a `name`, or an object by name whose values may be just the training file.
    """
    listed = _listed(raw.get("stages") or {})
    kind = raw.get("chain")
    if kind is not None:
        listed = _over(kind, listed)
    if not listed:
        raise SpecError("'stages' is empty; list at least one job spec with a name.", param="stages")
    if len(listed) > MOST:
        raise SpecError(f"The chain has {len(listed)} stages; at most {MOST} are allowed.", param="stages")
    return listed


def _listed(stages: Any) -> dict[str, dict[str, Any]]:
    if isinstance(stages, dict):
        stages = [
            {"name": k, **({"training_file": v} if isinstance(v, str) else _fields(k, v))} for k, v in stages.items()
        ]
    if not isinstance(stages, list):
        raise SpecError(
            f"'stages' is a list of job specs, each with a name, not {type(stages).__name__}.", param="stages"
        )
    found: dict[str, dict[str, Any]] = {}
    for number, stage in enumerate(stages, 1):
        name = _fields(f"number {number}", stage).get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            text = "has no name" if name is None else f"is called {name!r:.80}"
            allowed = "1 to 32 letters, digits, `.`, `_`, `-`"
            raise SpecError(f"The stage number {number} {text}; give it a name of {allowed}.", param="stages")
        if name in found:
            raise SpecError(f"Two stages are called '{name}'. Give each its own name.", param="stages")
        found[name] = {k: v for k, v in stage.items() if k != "name"}
    return found


def _fields(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        text = f"The stage {where} is {value!r:.80}; it must be a mapping of a job spec's fields to values."
        raise SpecError(text, param="stages")
    return value


def _over(kind: Any, stages: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The stages of a chain with a name, with the job's own fields over its; a part's options are merged."""
    known = CHAINS.get(kind) if isinstance(kind, str) else None
    if known is None:
        near = did_you_mean(str(kind), CHAINS)
        raise SpecError(f"There is no chain {kind!r:.80}. Use one of: {', '.join(CHAINS)}.{near}", param="chain")
    strange = [name for name in stages if name not in known]
    if strange:
        near = did_you_mean(strange[0], known)
        text = f"The chain '{kind}' has no stage '{strange[0]}'.{near} Its stages: {', '.join(known)}."
        raise SpecError(text, param="stages")
    return {name: {**fields, **_merged(fields, stages.get(name, {}))} for name, fields in known.items()}


def _merged(known: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own` with the options of the known objective where it has the same one."""
    asked, usual = own.get("objective"), known["objective"]
    if not isinstance(asked, dict) or not isinstance(usual, dict) or asked.get("name", usual["name"]) != usual["name"]:
        return own
    return {**own, "objective": {**usual, **asked}}


def _suffix(name: str, fields: Mapping[str, Any], common: Mapping[str, Any]) -> Any:
    """Of a stage's model: its own, else the chain's with the stage's name behind it."""
    if fields.get("suffix") is not None:
        return fields["suffix"]
    whole = common.get("suffix")
    return f"{whole[: 63 - len(name)]}-{name}" if isinstance(whole, str) else whole or name


def in_stage(name: str, error: Wrong) -> Wrong:
    """The same error with the stage's name before it."""
    found = copy(error)
    found.message = f"Stage '{name}': {error.message}"
    return found


# --- references ------------------------------------------------------------------------------------------------------


def parts_of(spec: JobSpec) -> Iterator[tuple[str, Part]]:
    """Every part of a job with its field's name."""
    yield from ((kind, getattr(spec, kind)) for kind in KINDS)
    yield from ((kind, part) for kind in LISTS for part in getattr(spec, kind))


def references(spec: JobSpec) -> list[tuple[str, str]]:
    """(where, stage's name) of all that the spec wants of other stages: `model`, or the option of a part."""
    options = [(key, value) for _, part in parts_of(spec) for key, value in part.options.items()]
    judges = [(f"{key}.model", name) for key, value in options for name in _judges(value)]
    wanted = [("model", spec.model), *options, *judges]
    return [(where, v.removeprefix(PREFIX)) for where, v in wanted if isinstance(v, str) and v.startswith(PREFIX)]


def _judges(option: Any) -> Iterator[Any]:
    """Everything under a key `model` in an option that is an object, however deep: of a grader, its judges."""
    for key, value in option.items() if isinstance(option, dict) else ():
        if key == "model":
            yield value
        yield from _judges(value)


def _bad_references(found: Stages, names: list[str]) -> Iterator[str]:
    """Stages run in their order, so that one which comes later, or the stage itself, has no result yet."""
    for name, spec in found.items():
        before = names[: names.index(name)]
        usable = f"the stages before it are {', '.join(before)}" if before else "it is the first stage"
        for where, wanted in references(spec):
            if wanted not in names:
                yield f"Stage '{name}': {where} names the stage '{wanted}', which does not exist; {usable}." + (
                    did_you_mean(wanted, before)
                )
            elif wanted not in before:
                when = "the stage itself" if wanted == name else "a later stage"
                yield f"Stage '{name}': {where} names '{wanted}', {when}, which has no result yet; {usable}."


def fill_in(spec: JobSpec, models: Mapping[str, str]) -> JobSpec:
    """The spec with the models of other stages in the places of their names."""

    def known(value: Any) -> Any:
        found = isinstance(value, str) and value.startswith(PREFIX)
        return models[value.removeprefix(PREFIX)] if found else value

    def judged(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: known(v) if k == "model" else judged(v) for k, v in value.items()}

    def filled(part: Part) -> Part:
        return Part(name=part.name, options={k: judged(known(v)) for k, v in part.options.items()})

    changes = {kind: filled(getattr(spec, kind)) for kind in KINDS}
    lists = {kind: [filled(part) for part in getattr(spec, kind)] for kind in LISTS}
    return spec.model_copy(update={"model": known(spec.model), **changes, **lists})


def files_of(spec: JobSpec) -> dict[str, str]:
    """{role: path or file id} of all data files of a job: `train`, `validation` and those of extra_files."""
    validation = {} if spec.validation_file is None else {"validation": spec.validation_file}
    return {"train": spec.training_file, **validation, **extra_files(spec)}


# --- what fits -------------------------------------------------------------------------------------------------------


def check_stages(stages: Stages, describe: dict[str, Any]) -> Stages:
    """Every stage's parts validated and filled in, as check_parts does, and whether each stage can use what it names.

    A stage without a tuner of its own goes on with that of the stage it continues from, where that left an adapter or
    a delta. Raises one SpecError that lists all problems of all stages.
    """
    found: Stages = {}
    problems = []
    for name, spec in stages.items():
        try:
            found[name] = check_parts(_with_tuner(spec, found, describe), describe)
        except SpecError as e:
            problems.append(in_stage(name, e).message)
            continue
        problems += [f"Stage '{name}': {text}" for text in _unfit(found[name], found, describe)]
    if problems:
        raise SpecError(" ".join(problems), param="stages")
    return found


def _with_tuner(spec: JobSpec, found: Stages, describe: dict[str, Any]) -> JobSpec:
    start = _start(spec, found)
    if start is None or "tuner" in spec.model_fields_set or not _goes_on(start, describe):
        return spec
    return spec.model_copy(update={"tuner": start.tuner})


def _start(spec: JobSpec, found: Stages) -> JobSpec | None:
    """The stage that the job continues from, if it is a stage (and one without problems)."""
    return found.get(spec.model.removeprefix(PREFIX)) if spec.model.startswith(PREFIX) else None


def _goes_on(start: JobSpec, describe: dict[str, Any]) -> bool:
    return describe["tuner"][start.tuner.name]["card"]["artefact"] in ("adapter", "delta")


def _unfit(spec: JobSpec, found: Stages, describe: dict[str, Any]) -> Iterator[str]:
    """What the job cannot do with the results that it names."""
    start = _start(spec, found)
    kind = {name: row["card"]["artefact"] for name, row in describe["tuner"].items()}
    if start is not None and kind[spec.tuner.name] != "weights" and kind[start.tuner.name] != "weights":
        was, is_ = kind[start.tuner.name], kind[spec.tuner.name]
        if was != is_:
            yield (
                f"it continues from '{spec.model.removeprefix(PREFIX)}', which leaves the kind '{was}' (tuner "
                f"{start.tuner.name}); the tuner '{spec.tuner.name}' goes on from kind '{is_}' only. Use the same "
                "tuner, or one that trains all weights (full)."
            )
    for where, name in references(spec):
        head = found[name].head if name in found else None
        wanted = spec.head if where == "model" else HEAD_OF.get(where, "lm")
        if head is not None and head not in (wanted, "lm" if where == "model" else wanted):
            yield (
                f"{where} names '{name}', whose model has the head '{head}'; it must have the head '{wanted}' "
                f"(objective: {HEADS[wanted]})."
            )
