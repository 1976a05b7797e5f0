"""The create forms as data: fields from JSON Schema, text to values, a draft to the request that creates something."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tunewright.web.rules import unfit

AUTO = "auto"
FILE = "file"  # the option of a method against forgetting that holds a data file


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


def fields(row: dict[str, Any]) -> list[FormField]:
    """The options of a table's row, in the schema's order; those that hold files or models have inputs of their own."""
    schema, defaults = row["schema"], row["defaults"]
    named = {FILE, *row.get("card", {}).get("models", ())}
    shown = {n: p for n, p in schema.get("properties", {}).items() if n not in named}
    return [form_field(n, resolve(p, schema), defaults.get(n)) for n, p in shown.items()]


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
KINDS = ("objective", "tuner", "optimizer", "schedule")
STAGE_PARTS = ("objective", "tuner")  # that a further stage of a chain chooses for itself
RATE = ("Learning rate", float, 1e-12, 10.0)
STAGE_NUMBERS = {**{k: HYPERPARAMETERS[k] for k in ("n_epochs", "batch_size")}, "learning_rate": RATE}
FIRST = 0  # the id of a chain's first stage, which is the draft itself
BEFORE = "stage:"  # a stage's model that is an earlier stage's result: this, and in a draft its id, else its name
DEFAULT_PARTS = {"objective": "sft", "tuner": "lora", "optimizer": "adamw", "schedule": "linear", "quantization": AUTO}


def default_part(kind: str, describe: dict[str, Any]) -> str:
    wanted = DEFAULT_PARTS.get(kind, "")
    return wanted if wanted in describe[kind] else sorted(describe[kind])[0]


class Reader:
    """Reads a draft of input texts; what cannot be read is kept as a problem, so that all come at once."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def __call__(self, read: Any, *args: Any) -> Any:
        try:
            return read(*args)
        except ValueError as e:
            self.problems.append(str(e))
            return None

    def need(self, value: Any, problem: str) -> Any:
        if not value:
            self.problems.append(problem)
        return value


def job_request(draft: dict[str, Any], describe: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(body of POST /v1/fine_tuning/jobs, problems) from a draft; with problems nothing is sent."""
    read = Reader()
    training = read.need(draft.get("training_file"), "Choose a training file.") or {}
    model = read.need(draft.get("model"), "Choose a base model.")
    hyper = {k: read(auto_or, row[0], draft.get(k), *row[1:]) for k, row in HYPERPARAMETERS.items()}
    body: dict[str, Any] = {"model": model, "training_file": training.get("id")}
    if draft.get("validation_file"):
        body["validation_file"] = draft["validation_file"]["id"]
    if draft.get("suffix"):
        body["suffix"] = draft["suffix"].strip()
    if str(draft.get("seed") or "").strip():
        body["seed"] = read(numeric, "Seed", str(draft["seed"]).strip(), int, 0, 2_147_483_647)
    method = method_of(draft.get("objective") or "sft", describe)
    extra = {kind: read(part_of, kind, draft, describe) for kind in KINDS}
    rate = read(auto_or, RATE[0], draft.get("learning_rate"), *RATE[1:])
    more = {
        "learning_rate": None if rate == AUTO else rate,
        "quantization": None if (draft.get("quantization") or AUTO) == AUTO else draft["quantization"],
        "retain": [read(retained, entry, draft, describe) for entry in draft.get("retain") or []],
        "mix": mixed(draft, read),
    }
    own = {**extra, **{name: value for name, value in more.items() if value}}
    if draft.get("stages"):
        names = stage_names(draft)
        first = {"name": names[FIRST], **own, **settled(hyper)}
        later = [read(stage_of, entry, draft, describe, names) for entry in draft["stages"]]
        body["tunewright"] = {"stages": [first, *later]}
        return body, read.problems + clashes(draft, describe)
    if method:
        asked = {"grader": (own.get("objective") or {}).pop("grader", None)} if method == "reinforcement" else {}
        if asked:
            read.need(asked["grader"], 'Grader: say what gives the rewards, as an object like {"type": …}.')
        body["method"] = {"type": method, method: {**asked, "hyperparameters": hyper}}
    else:
        body["hyperparameters"] = hyper
    body["tunewright"] = own
    return body, read.problems + clashes(draft, describe)


def settled(hyper: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters that are numbers."""
    return {name: value for name, value in hyper.items() if value not in (AUTO, None)}


def stage_role(entry: dict[str, Any]) -> str:
    """The key of a further stage's file in the draft, and the beginning of those of its options."""
    return f"chain-{entry['id']}"


def stage_names(draft: dict[str, Any]) -> dict[int, str]:
    """{id: name} of all stages, in order; the draft itself is the one with the id FIRST. A name is the objective's."""
    listed = [(FIRST, draft.get("objective") or DEFAULT_PARTS["objective"])]
    listed += [(entry["id"], entry["objective"]) for entry in draft.get("stages") or []]
    found, used = {}, Counter[str]()
    for i, objective in listed:
        used[objective] += 1
        found[i] = objective if used[objective] == 1 else f"{objective}-{used[objective]}"
    return found


def row_format(key: str, draft: dict[str, Any], describe: dict[str, Any]) -> str:
    """The format in which the job would read a file's rows. key: the file's in the draft."""
    stage = next((entry for entry in draft.get("stages") or [] if stage_role(entry) == key), draft)
    objective = stage.get("objective") or DEFAULT_PARTS["objective"]
    card = describe["objective"].get(objective, {}).get("card", {})
    return "reinforcement" if card.get("needs_rollouts") and not key.startswith("retain") else AUTO


def stage_of(
    entry: dict[str, Any], draft: dict[str, Any], describe: dict[str, Any], names: dict[int, str]
) -> dict[str, Any]:
    """A further stage's job spec. names: of stage_names(). Raises ValueError with everything wrong."""
    read, role, name = Reader(), stage_role(entry), names[entry["id"]]
    file = read.need(draft.get(role), "Choose a training file.")
    texts = draft.get("options", {})
    parts = {}
    for kind in STAGE_PARTS:
        chosen = entry.get(kind)
        if chosen:
            options = read(options_of, describe[kind][chosen], texts.get(f"{role}.{kind}.{chosen}", {}))
            parts[kind] = {"name": chosen, **(options or {})}
    start = entry.get("model") or ""
    numbers = {k: read(auto_or, row[0], entry.get(k), *row[1:]) for k, row in STAGE_NUMBERS.items()}
    if read.problems:
        raise ValueError(f"Stage '{name}': {' '.join(read.problems)}")
    before = {f"{BEFORE}{i}": f"{BEFORE}{known}" for i, known in names.items()}
    model = {"model": before.get(start, start)} if start else {}
    return {"name": name, **model, "training_file": file["id"], **parts, **settled(numbers)}


def job_file(body: dict[str, Any], draft: dict[str, Any]) -> dict[str, Any]:
    """A request without problems as the job file of `tunewright train` that does the same; data files are called by
    their names."""
    own = dict(body["tunewright"])
    method = body.get("method") or {}
    block = dict(method.get(method.get("type"), {}))
    numbers = settled(block.pop("hyperparameters", body.get("hyperparameters") or {}))
    if "objective" in own:
        own["objective"] = {**own["objective"], **block}
    plain = {k: v for k, v in body.items() if k not in ("tunewright", "method", "hyperparameters")}
    files = {f["id"]: f["filename"] for f in draft.values() if isinstance(f, dict) and "filename" in f}
    return _with_names({**plain, **numbers, **own}, files)


def _with_names(value: Any, files: dict[str, str]) -> Any:
    """The value with names in the places of the files' ids."""
    if isinstance(value, dict):
        return {k: _with_names(v, files) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_names(v, files) for v in value]
    return files.get(value, value) if isinstance(value, str) else value


def clashes(draft: dict[str, Any], describe: dict[str, Any]) -> list[str]:
    """What is chosen and does not go together, in the words of rules.py; of two that clash the first is said."""
    for kind in ("quantization", *KINDS):
        if kind not in describe:
            continue
        name = draft.get(kind) or default_part(kind, describe)
        why = unfit(kind, draft, describe).get(name)
        if why:
            return [f"{kind.capitalize()} '{name}' cannot be used: {why}."]
    return []


def method_of(objective: str, describe: dict[str, Any]) -> str | None:
    """OpenAI's name of an objective, None if it has none."""
    return describe["objective"].get(objective, {}).get("card", {}).get("openai_method")


def part_of(kind: str, draft: dict[str, Any], describe: dict[str, Any]) -> dict[str, Any]:
    """{"name", options that differ from their defaults} of one part. Raises ValueError with everything wrong."""
    name = draft.get(kind) or default_part(kind, describe)
    return {"name": name, **options_of(describe[kind][name], draft.get("options", {}).get(f"{kind}.{name}", {}))}


def options_of(row: dict[str, Any], texts: dict[str, Any]) -> dict[str, Any]:
    """The options whose inputs were touched and differ from their defaults. Raises ValueError with everything wrong."""
    read = Reader()
    values = {f.name: read(parsed, f, texts[f.name]) for f in fields(row) if f.name in texts}
    if read.problems:
        raise ValueError(" ".join(read.problems))
    return {f.name: values[f.name] for f in fields(row) if f.name in values and values[f.name] != f.default}


def retained(entry: dict[str, Any], draft: dict[str, Any], describe: dict[str, Any]) -> dict[str, Any]:
    """One method against forgetting. Raises ValueError with what it lacks."""
    row, role = describe["retain"][entry["name"]], f"retain-{entry['id']}"
    file, rows = draft.get(role), row["card"].get("rows")
    if rows == "required" and not file:
        raise ValueError(f"{row['card']['title']} needs rows of what must not be forgotten: choose a file for it.")
    options = options_of(row, draft.get("options", {}).get(f"{role}.{entry['name']}", {}))
    return {"name": entry["name"], **options, **({FILE: file["id"]} if file and rows != "none" else {})}


def mixed(draft: dict[str, Any], read: Reader) -> dict[str, Any] | None:
    """`mix`: the further files, and by which rule they share an epoch."""
    chosen = draft.get("mix") or {}
    ids = chosen.get("ids") or []
    if not ids:
        return None
    weights, files = chosen.get("weights") or {}, []
    for number, i in enumerate(ids, 1):
        file = read.need(draft.get(f"mix-{i}"), f"Choose a file for further training file {number}, or remove it.")
        files.append({"file": (file or {}).get("id"), **_weight(weights.get(str(i)), read)})
    rule = {**_weight(weights.get("0"), read)}
    heat = str(chosen.get("temperature") or "").strip()
    if heat:
        rule["temperature"] = read(numeric, "Temperature of the mix", heat, float, 1e-6, 100.0)
    if heat and (rule.get("weight") or any("weight" in f for f in files)):
        read.problems.append("Weights and a temperature both say how large the parts of the mix are; give one of them.")
    return {"files": files, **rule}


def _weight(text: Any, read: Reader) -> dict[str, Any]:
    text = str(text or "").strip()
    return {"weight": read(numeric, "Weight", text, float, 1e-6, 1e6)} if text else {}


def recipe_request(draft: dict[str, Any], describe: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(body of POST /v1/tunewright/recipes, problems) from a draft."""
    read = Reader()
    name = draft.get("recipe") or default_part("recipe", describe)
    row = describe["recipe"][name]
    card, kept = row["card"], draft.get("options", {}).get(f"recipe.{name}", {})
    part = {"name": name, **(read(options_of, row, kept) or {})}
    for field in card["models"]:
        part[field] = read.need(kept.get(field), f"{field.capitalize()}: choose a model.")
    files = [draft[key] for key in data_keys(draft, card["data"]) if draft.get(key)]
    if card["data"]:
        read.need(files, {"rows": "Choose a file of solved rows.", "documents": "Choose a document."}[card["data"]])
    body = {"recipe": part, "model": read.need(draft.get("model"), "Choose the model below.")}
    if files:
        body["data"] = [file["id"] for file in files]
    if draft.get("suffix"):
        body["suffix"] = draft["suffix"].strip()
    decoding = {
        k: read(numeric, row[0], str(draft[k]).strip(), *row[1:]) for k, row in DECODING.items() if draft.get(k)
    }
    return {**body, **({"decoding": decoding} if decoding else {})}, read.problems


def data_keys(draft: dict[str, Any], data: str) -> list[str]:
    """Where a recipe's draft keeps its files. data: what its card asks for."""
    return {"rows": ["rows"], "documents": [f"document-{i}" for i in draft.get("documents") or [0]]}.get(data, [])


DECODING = {
    "temperature": ("Temperature", float, 0, 2),
    "max_tokens": ("Longest answer", int, 1, 8192),
}
