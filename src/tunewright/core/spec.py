"""The job spec: one pydantic model shared by YAML, HTTP and the create form.

Options of a part (tuner, objective, optimizer, schedule) are free here and validated against the describe file
(`python -m tunewright.train.describe`), because their models live beside code that imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

import jsonschema
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_serializer, model_validator

from tunewright.core.allowed import QUANTIZATIONS, bad_option
from tunewright.core.errors import SpecError, did_you_mean

Auto = Literal["auto"]
Spec = TypeVar("Spec", bound=BaseModel)
# head -> the plain objective that trains it
HEADS = {"lm": "sft", **{head: head for head in ("classify", "multilabel", "regress", "reward")}}
# objectives whose rows are prompts to be answered and graded: with format `auto` these are read as such
GRADED = ("grpo", "ppo", "rloo")
KINDS = ("tuner", "objective", "optimizer", "schedule")  # one part each
LISTS = ("retain",)  # any number of parts


class Part(BaseModel):
    """A row of a table with its options. Written as `lora` or `{name: lora, r: 16}`."""

    model_config = ConfigDict(extra="forbid")
    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if not isinstance(value, dict | Part):
            raise ValueError("expected a name, like lora, or an object of a name and options, like {name: lora, r: 16}")
        if isinstance(value, dict) and "name" in value:
            options = value.get("options") or {}
            if not isinstance(options, dict):
                raise ValueError("its 'options' must be an object of names and values")
            rest = {k: v for k, v in value.items() if k not in ("name", "options")}
            return {"name": value["name"], "options": {**options, **rest}}
        return value

    @model_serializer
    def _dump(self) -> dict[str, Any]:
        return {"name": self.name, **self.options}


class MixFile(BaseModel):
    """A further training file. Written as its path (or file id), or `{file: …, weight: 2}`."""

    model_config = ConfigDict(extra="forbid")
    file: str = Field(min_length=1)
    weight: float | None = Field(None, gt=0, le=1e6)

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        return {"file": value} if isinstance(value, str) else value


class Mix(BaseModel):
    """Several training files in one job. files: those beside training_file. weight: of training_file.
    order: `shuffled` mixes their rows within each epoch; `in_turn` trains all epochs of one file before the next.

    Without weights a file of n rows has the share n^(1 / temperature) of an epoch: 1 takes each row once, higher ones
    bring the files closer to equal parts. With weights (1 where one is missing) these are the shares.
    """

    model_config = ConfigDict(extra="forbid")
    files: list[MixFile] = Field(min_length=1, max_length=32)
    weight: float | None = Field(None, gt=0, le=1e6)
    temperature: float = Field(1.0, gt=0, le=100)
    order: Literal["shuffled", "in_turn"] = "shuffled"

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        return {"files": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one_rule(self) -> Mix:
        if self.weights() is not None and self.temperature != 1.0:
            raise ValueError("weights and a temperature both say how large the parts are; give one of them")
        return self

    def weights(self) -> list[float] | None:
        """Of training_file and the files, if any of them has one."""
        given = [self.weight, *(f.weight for f in self.files)]
        return None if all(w is None for w in given) else [1.0 if w is None else w for w in given]


@dataclass(frozen=True)
class TaskPreset:
    """What `task` fills in where the spec says nothing. It has no other effect."""

    format: str
    head: str
    metric: str
    decoding: dict[str, Any]
    early_stop_metric: str


TASKS: dict[str, TaskPreset] = {
    "chat": TaskPreset("auto", "lm", "mean_token_accuracy", {}, "full_valid_loss"),
    "generate": TaskPreset("auto", "lm", "perplexity", {"temperature": 0.7}, "full_valid_loss"),
    "classify": TaskPreset("auto", "lm", "accuracy", {"temperature": 0.0, "max_tokens": 32}, "full_valid_loss"),
    "regress": TaskPreset(
        "auto", "lm", "mean_absolute_error", {"temperature": 0.0, "max_tokens": 16}, "full_valid_loss"
    ),
    "qa": TaskPreset("auto", "lm", "f1", {"temperature": 0.0, "max_tokens": 256}, "full_valid_loss"),
    "summarise": TaskPreset("auto", "lm", "rouge_l", {"temperature": 0.0, "max_tokens": 256}, "full_valid_loss"),
}


class JobSpec(BaseModel):
    """What to train, on what, and how. Every field but `model` and `training_file` has a default that works.

    model: a catalogue name, a folder, or an `ft:` model or checkpoint to continue from.
    training_file, validation_file: a path (command line) or a file id (HTTP).
    task: a preset that fills in format, head, metric, decoding and early_stop_metric.
    format: the row format; `auto` looks at the rows and says why it decided so.
    train_on: `assistant` trains every assistant turn (per-message `weight` may switch one off), `last` only the last.
    objective: toward what is trained. tuner: what is trained. optimizer: the update rule.
    schedule: how the learning rate moves over the steps.
    retain: methods against forgetting, each a part: `[{name: replay, file: old.jsonl}]`. file: a path or a file id.
    mix: further training files and their shares of an epoch: `[b.jsonl]` or `{files: [{file: b.jsonl, weight: 2}]}`;
        with `order: in_turn` first all epochs of training_file, then of each file.
    n_epochs: passes over the data. batch_size: groups (rows) in one optimizer step.
    learning_rate: absolute; `auto` is the tuner's default, for preferences and rewards a tenth of it (ORPO: a
        fifth), times learning_rate_multiplier.
    learning_rate_multiplier: a factor on the learning rate; `auto` is 1.
    max_grad_norm: gradients are scaled down to this norm; 0 never clips.
    max_length: tokens a row may have; `auto` is the model's context, and 1024 (or the context) for the blocks into
        which plain texts are laid. overlong: what happens to a longer row; plain texts are cut into pieces instead.
    seed: fixes data order, initial weights and noise; None draws one, which job.json then records.
    suffix: up to 64 letters, digits, `.`, `_`, `-` in the finished model's name.
    neftune_alpha: size of the uniform noise on the embeddings while training (NEFTune, arXiv 2310.05914, where 5 to 15
        helped chat models); 0 adds none.
    router_loss: factor of the routers' load-balancing loss, for a mixture of experts; 0 adds none.
    dtype: of the computation; `auto` is bfloat16 where the hardware multiplies it, else float32; float16 comes with
        loss scaling.
    quantization: how the base's linear layers are held while an adapter is trained over them (QLoRA): `nf4` (4 bits),
        `int8` or `none`; `auto` is none, and nf4 where the base would not fit otherwise. Needs bitsandbytes.
    micro_batch_tokens: tokens computed at once inside a step; changes memory and speed, not the result.
    checkpointing: layers that are computed again in the backward to save memory: none, every second one (`selective`)
        or all (`full`); `auto` is the fastest that fits.
    max_memory: what the job may hold, e.g. `4GB` (of the GPU if there is one); None is what is free.
    eval_every: steps between validation batches; eval_rows: rows of such a batch.
    early_stopping: epochs without improvement of early_stop_metric before stopping; None never stops.
    early_stop_metric, metric, decoding: filled in by the task where empty.
    head: what the model answers with: `lm` (tokens), `classify` (the class of a whole text), `multilabel` (its
        classes), `regress` (a value) or `reward` (how good an answer is, from pairs); the objective follows. Empty is
        `lm`.
    result: which checkpoint becomes the model: the last, or the best by early_stop_metric (`auto`: best if
        early_stopping is set, else last).
    save_every_seconds, save_every_steps: how often a recovery checkpoint is written; epoch ends always are.
    keep_checkpoints: how many epoch checkpoints stay, as callable models.
    min_examples: fewer rows than this are refused (OpenAI asks for 10).
    threads: CPU threads; `auto` is all cores.
    path: `auto` runs this machine's own kernels where they serve the model and tuner, `plain` the model's modules.
    metadata: pairs of your own, stored with the job.
    """

    model_config = ConfigDict(extra="forbid", validate_default=True)

    model: str = Field(min_length=1)
    training_file: str = Field(min_length=1)
    validation_file: str | None = None
    task: Literal["chat", "generate", "classify", "regress", "qa", "summarise"] = "chat"
    format: str = "auto"
    train_on: Literal["assistant", "last"] = "assistant"
    objective: Part = Part(name="sft")
    tuner: Part = Part(name="lora")
    optimizer: Part = Part(name="adamw")
    schedule: Part = Part(name="linear")
    retain: list[Part] = Field(default_factory=list, max_length=8)
    mix: Mix | None = None
    n_epochs: Auto | int = Field("auto")
    batch_size: Auto | int = Field("auto")
    learning_rate: Auto | float = Field("auto")
    learning_rate_multiplier: Auto | float = Field("auto")
    max_grad_norm: float = Field(1.0, ge=0)
    max_length: Auto | int = "auto"
    overlong: Literal["error", "truncate", "drop"] = "error"
    min_examples: int = Field(10, ge=1)
    seed: int | None = Field(None, ge=0, le=2_147_483_647)
    suffix: str | None = Field(None, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")
    neftune_alpha: float = Field(0.0, ge=0, le=100)
    router_loss: float = Field(0.0, ge=0, le=10)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["auto", "none", "nf4", "int8"] = "auto"
    micro_batch_tokens: Auto | int = "auto"
    checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    max_memory: str | None = None
    threads: Auto | int = "auto"
    path: Literal["auto", "plain"] = "auto"
    eval_every: Auto | int = "auto"
    eval_rows: int = Field(16, ge=1)
    early_stopping: int | None = Field(None, ge=1)
    early_stop_metric: str = ""
    metric: str = ""
    head: str = ""
    decoding: dict[str, Any] = Field(default_factory=dict)
    result: Literal["auto", "last", "best"] = "auto"
    save_every_seconds: float = Field(60.0, gt=0)
    save_every_steps: int | None = Field(None, ge=1)
    keep_checkpoints: int = Field(3, ge=1)
    metadata: dict[str, str] | None = None

    @model_validator(mode="after")
    def _ranges(self) -> JobSpec:
        limits = {
            "n_epochs": (1, 50),
            "batch_size": (1, 256),
            "max_length": (8, 1 << 20),
            "micro_batch_tokens": (1, 1 << 24),
            "threads": (1, 1024),
            "eval_every": (1, 1 << 30),
            "learning_rate": (1e-12, 10.0),
            "learning_rate_multiplier": (1e-6, 1e6),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value != "auto" and not low <= value <= high:
                raise ValueError(f"{name} is {value}; allowed: 'auto' or {low:g} to {high:g}")
        return self

    @field_validator("retain", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | dict) else value

    @field_validator("max_memory", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        if value is not None:
            parse_bytes(value)
        return value if value is None else str(value)

    @model_validator(mode="after")
    def _needs_validation(self) -> JobSpec:
        wants = [
            *(["early_stopping"] if self.early_stopping is not None else []),
            *(["result 'best'"] if self.result == "best" else []),
        ]
        if wants and not self.validation_file and not self.early_stop_metric.startswith("train_"):
            raise ValueError(f"{' and '.join(wants)}: which epoch is best shows on other rows; give a validation_file")
        return self

    @model_validator(mode="after")
    def _preset(self) -> JobSpec:
        preset = TASKS[self.task]
        of_rows = {objective: head for head, objective in HEADS.items() if head != "lm"}
        if not self.head and self.objective.name in of_rows:
            object.__setattr__(self, "head", of_rows[self.objective.name])
        if self.head and self.head not in HEADS:
            raise ValueError(f"head is '{self.head}'; use one of: {', '.join(HEADS)}{did_you_mean(self.head, HEADS)}")
        if self.head in HEADS and "objective" not in self.model_fields_set:
            object.__setattr__(self, "objective", Part(name=HEADS[self.head]))
        for name in ("head", "metric", "early_stop_metric"):
            if not getattr(self, name):
                object.__setattr__(self, name, getattr(preset, name))
        if self.format == "auto":
            object.__setattr__(self, "format", "reinforcement" if self.objective.name in GRADED else preset.format)
        object.__setattr__(self, "decoding", {**preset.decoding, **self.decoding})
        return self


def extra_files(spec: JobSpec) -> dict[str, str]:
    """{role: path or file id} of the data files beside training and validation file. A role is the field and the
    place in it, from 1: `retain-1`, `mix-2`."""
    retained = ((f"retain-{i}", part.options.get("file")) for i, part in enumerate(spec.retain, 1))
    mixed = ((f"mix-{i}", f.file) for i, f in enumerate(spec.mix.files if spec.mix else [], 1))
    return {role: file for role, file in (*retained, *mixed) if isinstance(file, str) and file}


def parse_bytes(value: str | int) -> int:
    """A number of bytes from `4GB`, `512 MiB`, `1.5g` or a plain number. Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])?(i)?b?)\s*", str(value), re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise ValueError(f"'{value}' is not an amount of memory; examples: 4GB, 512MB, 1.5GiB")
    power = " kmgt".index((found[2] or " ").lower())
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def parse_spec(raw: Any) -> JobSpec:
    """A JobSpec from plain data. Raises one SpecError that lists everything wrong, with the nearest field names."""
    return parse_as(JobSpec, raw, "job spec")


def parse_as(model: type[Spec], raw: Any, what: str) -> Spec:
    """The same for any such model. what: it is called in errors."""
    if not isinstance(raw, dict):
        raise SpecError(f"A {what} is a mapping of fields to values, not {type(raw).__name__}.")
    try:
        return model.model_validate(raw)
    except ValidationError as e:
        raise SpecError(explain_validation(e, model, what), param=_first_param(e)) from e


def explain_validation(error: ValidationError, model: type[BaseModel], what: str) -> str:
    """pydantic's errors as one text: field, value, what is allowed, the nearest match. what: the thing not valid."""
    lines = []
    for item in error.errors():
        names = [str(p) for p in item["loc"] if not str(p).startswith(("literal[", "function-"))]
        where = ".".join(n for n in names if n not in ("int", "float", "str", "bool"))
        if item["type"] == "extra_forbidden":
            known = sorted(model.model_fields)
            lines.append(f"unknown field '{where}'.{did_you_mean(names[-1], known)} Known: {', '.join(known)}")
        elif item["type"] == "missing":
            lines.append(f"the field '{where}' is missing")
        else:
            value = repr(item.get("input"))[:80]
            text = item["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: {text} (got {value})" if where else text)
    return f"The {what} is not valid: " + "; ".join(dict.fromkeys(lines)) + "."


def _first_param(error: ValidationError) -> str | None:
    loc = error.errors()[0]["loc"]
    return str(loc[0]) if loc else None


def check_parts(spec: JobSpec, describe: dict[str, Any]) -> JobSpec:
    """Validate each part's name and options against the describe file and fill in the defaults.

    describe: {"tuner": {"lora": {"schema": JSON Schema, "defaults": {…}, "card": {…}}}, …}.
    Raises one SpecError that lists all problems.
    """
    problems: list[str] = []
    first: str | None = None
    updates: dict[str, Any] = {kind: [] for kind in LISTS}
    asked = [(kind, getattr(spec, kind)) for kind in KINDS]
    asked += [(kind, part) for kind in LISTS for part in getattr(spec, kind)]
    for kind, part in asked:
        found = list(_problems(kind, part, describe[kind], spec.head))
        problems += found
        first = first or (kind if found else None)
        checked = part
        if part.name in describe[kind]:
            defaults = describe[kind][part.name]["defaults"]
            checked = Part(name=part.name, options={**defaults, **part.options})
        if kind in LISTS:
            updates[kind].append(checked)
        else:
            updates[kind] = checked
    unfit = _not_over_quantised(spec, describe["tuner"])
    if problems or unfit:
        text = "; ".join(dict.fromkeys([*problems, *unfit]))
        raise SpecError(f"The job spec is not valid: {text}.", param=first or "quantization")
    return spec.model_copy(update=updates)


def _problems(kind: str, part: Part, rows: dict[str, Any], head: str) -> Iterator[str]:
    """What is wrong with one part. rows: what the describe file says of its table."""
    if part.name not in rows:
        near = did_you_mean(part.name, rows).rstrip("?").replace(" Did", "; did")
        yield f"there is no {kind} '{part.name}'; use one of: {', '.join(sorted(rows))}{near}"
        return
    row = rows[part.name]
    card, known = row["card"], row["schema"].get("properties", {})
    needs = card.get("needs")
    if needs and find_spec(needs) is None:
        yield f"{kind} '{part.name}' needs the package {needs}, which is not installed; pip install {needs}"
    for error in jsonschema.Draft202012Validator(row["schema"]).iter_errors(part.options):
        if error.validator == "additionalProperties":
            for key in sorted(set(part.options) - set(known)):
                yield (
                    f"{kind} '{part.name}' has no option '{key}'.{did_you_mean(key, known)}"
                    f" Its options: {', '.join(sorted(known)) or 'none'}"
                )
        else:
            yield f"{kind} '{part.name}', {bad_option(error, row)}"
    if card.get("rows") == "required" and not part.options.get("file"):
        yield f"{kind} '{part.name}' needs rows of what must not be forgotten; give its option 'file'"
    for name in card.get("required", ()):
        if not part.options.get(name):
            yield f"{kind} '{part.name}' needs its option '{name}': {known[name].get('description', '')}"
    either = card.get("either", ())
    if either and not any(part.options.get(name) for name in either):
        said = "; ".join(f"'{name}': {known[name].get('description', '')}" for name in either)
        yield f"{kind} '{part.name}' needs one of its options {said}"
    if kind == "objective" and card.get("head", head) != head:
        fits = [name for name, other in rows.items() if other["card"].get("head", "lm") == head]
        yield (
            f"head is '{head}', but the objective '{part.name}' trains the head '{card['head']}'; use objective: "
            f"{' or '.join(sorted(fits))}, or head: {card['head']}"
        )


def _not_over_quantised(spec: JobSpec, tuners: dict[str, Any]) -> list[str]:
    """What keeps the job from running over a quantised base, if it asks for one."""
    asked = QUANTIZATIONS[spec.quantization]
    if not asked.frozen:
        return []
    found = []
    if asked.needs and find_spec(asked.needs) is None:
        found.append(
            f"quantization {spec.quantization} needs the package {asked.needs}, which is not installed; pip install "
            f"{asked.needs}"
        )
    works = {name: row["card"]["works_on_nf4"] for name, row in tuners.items()}
    if not works.get(spec.tuner.name, True):
        kind = tuners[spec.tuner.name]["card"]["artefact"]
        why = "does not work over one" if kind == "adapter" else "trains weights of the base itself"
        found.append(
            f"quantization is '{spec.quantization}', which needs a frozen base, but the tuner '{spec.tuner.name}' "
            f"{why}; use quantization: none, or one of the tuners {', '.join(sorted(n for n in works if works[n]))}"
        )
    return found
