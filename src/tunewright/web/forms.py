"""The create form as data: fields from JSON Schema, text to values, a draft to the request that creates the job."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

AUTO = "auto"


@dataclass(frozen=True)
class FormField:
    """One option of a part. kind: `int`, `float`, `bool`, `choice`, `text` or `json`. optional: null is allowed."""

    name: str
    kind: str
    label: str
    help: str = ""
    default: Any = None
    choices: tuple[Any, ...] = ()
    optional: bool = False
    low: float | None = None
    high: float | None = None


def fields(schema: dict[str, Any], defaults: dict[str, Any]) -> list[FormField]:
    """The fields of an option block, in the schema's order."""
    return [form_field(n, resolve(p, schema), defaults.get(n)) for n, p in schema.get("properties", {}).items()]


def resolve(prop: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The property with a `$ref` into the schema's own definitions followed."""
    ref = prop.get("$ref", "")
    if not ref.startswith("#/$defs/"):
        return prop
    return {**schema["$defs"][ref.removeprefix("#/$defs/")], **{k: v for k, v in prop.items() if k != "$ref"}}


def form_field(name: str, prop: dict[str, Any], default: Any) -> FormField:
    options = prop.get("anyOf") or [prop]
    optional = any(o.get("type") == "null" for o in options)
    real = [o for o in options if o.get("type") != "null"]
    one = {**prop, **real[0]} if len(real) == 1 else prop
    return FormField(
        name=name,
        kind=kind_of(one, len(real)),
        label=name.replace("_", " ").capitalize(),
        help=prop.get("description", ""),
        default=default,
        choices=tuple(one["enum"]) if "enum" in one else (),
        optional=optional,
        low=one.get("minimum", one.get("exclusiveMinimum")),
        high=one.get("maximum", one.get("exclusiveMaximum")),
    )


def kind_of(prop: dict[str, Any], alternatives: int) -> str:
    if alternatives > 1:
        return "json"
    if "enum" in prop:
        return "choice"
    kinds = {"integer": "int", "number": "float", "boolean": "bool", "string": "text"}
    return kinds.get(str(prop.get("type")), "json")


def shown(field: FormField, value: Any) -> str:
    """A value as the text of its input; a word needs no quotes even where other types are allowed."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def parsed(field: FormField, text: Any) -> Any:
    """The value of an input. Raises ValueError with what is allowed."""
    if field.kind in ("bool", "choice"):
        return text
    text = "" if text is None else str(text).strip()
    if not text:
        if field.optional or field.kind == "text":
            return None if field.optional else ""
        raise ValueError(f"{field.label} needs a value.")
    if field.kind == "text":
        return text
    if field.kind == "json":
        return json_or_word(text)
    return numeric(field.label, text, int if field.kind == "int" else float, field.low, field.high)


def json_or_word(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def numeric(label: str, text: str, kind: type, low: float | None, high: float | None) -> Any:
    """The number in `text`. Raises ValueError with what is allowed."""
    allowed = f"a {'whole ' if kind is int else ''}number"
    allowed += "" if low is None else f" from {low:g}"
    allowed += "" if high is None else f" to {high:g}"
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"{label} is '{text}'; allowed: {allowed}.") from None
    if (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"{label} is {text}; allowed: {allowed}.")
    return value


def auto_or(label: str, text: Any, kind: type, low: float, high: float) -> Any:
    """`auto` or the number in `text`. Raises ValueError with what is allowed."""
    text = "" if text is None else str(text).strip()
    if text.lower() in ("", AUTO):
        return AUTO
    try:
        return numeric(label, text, kind, low, high)
    except ValueError as e:
        raise ValueError(str(e).replace("allowed: ", "allowed: auto, or ")) from None


HYPERPARAMETERS = {
    "n_epochs": ("Epochs", int, 1, 50),
    "batch_size": ("Batch size", int, 1, 256),
    "learning_rate_multiplier": ("Learning-rate multiplier", float, 1e-6, 1e6),
}


def job_request(draft: dict[str, Any], describe: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(body of POST /v1/fine_tuning/jobs, problems) from a draft of input texts; with problems nothing is sent."""
    problems: list[str] = []

    def attempt(read: Any, *args: Any) -> Any:
        try:
            return read(*args)
        except ValueError as e:
            problems.append(str(e))
            return None

    if not draft.get("training_file"):
        problems.append("Choose a training file.")
    if not draft.get("model"):
        problems.append("Choose a base model.")
    hyper = {k: attempt(auto_or, row[0], draft.get(k), *row[1:]) for k, row in HYPERPARAMETERS.items()}
    body: dict[str, Any] = {"model": draft.get("model"), "training_file": (draft.get("training_file") or {}).get("id")}
    if draft.get("validation_file"):
        body["validation_file"] = draft["validation_file"]["id"]
    if draft.get("suffix"):
        body["suffix"] = draft["suffix"].strip()
    if str(draft.get("seed") or "").strip():
        body["seed"] = attempt(numeric, "Seed", str(draft["seed"]).strip(), int, 0, 2_147_483_647)
    objective = draft.get("objective") or "sft"
    method = method_of(objective, describe)
    extra = {kind: attempt(part_of, kind, draft, describe) for kind in ("objective", "tuner", "optimizer", "schedule")}
    rate = attempt(auto_or, "Learning rate", draft.get("learning_rate"), float, 1e-12, 10.0)
    if rate != AUTO:
        extra["learning_rate"] = rate
    if method:
        body["method"] = {"type": method, method: {"hyperparameters": hyper}}
    else:
        body["hyperparameters"] = hyper
    body["tunewright"] = extra
    return body, problems


def method_of(objective: str, describe: dict[str, Any]) -> str | None:
    """OpenAI's name of an objective, None if it has none."""
    return describe["objective"].get(objective, {}).get("card", {}).get("openai_method")


def part_of(kind: str, draft: dict[str, Any], describe: dict[str, Any]) -> dict[str, Any]:
    """{"name", options that differ from their defaults} of one part. Raises ValueError with everything wrong."""
    name = draft.get(kind) or default_part(kind, describe)
    row = describe[kind][name]
    texts = draft.get("options", {}).get(f"{kind}.{name}", {})
    found: dict[str, Any] = {"name": name}
    problems = []
    for field in fields(row["schema"], row["defaults"]):
        if field.name not in texts:
            continue
        try:
            value = parsed(field, texts[field.name])
        except ValueError as e:
            problems.append(str(e))
            continue
        if value != field.default:
            found[field.name] = value
    if problems:
        raise ValueError(" ".join(problems))
    return found


DEFAULT_PARTS = {"objective": "sft", "tuner": "lora", "optimizer": "adamw", "schedule": "linear"}


def default_part(kind: str, describe: dict[str, Any]) -> str:
    wanted = DEFAULT_PARTS[kind]
    return wanted if wanted in describe[kind] else sorted(describe[kind])[0]
