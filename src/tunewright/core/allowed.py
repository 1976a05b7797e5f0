"""What may be chosen: how a base may be held, and the JSON Schema of an option in words."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import jsonschema

from tunewright.core.errors import did_you_mean


@dataclass(frozen=True)
class Quantization:
    """How a base is held. needs: the package that it takes. frozen: only what does not train the base works over it."""

    title: str
    doc: str
    needs: str | None = None
    frozen: bool = False


QUANTIZATIONS: dict[str, Quantization] = {
    "auto": Quantization("As it is; 4 bits where it would not fit", "nf4 only where memory asks for it."),
    "none": Quantization("As it is", "In the precision of the computation."),
    "nf4": Quantization("4 bits (NF4)", "About an eighth of the memory; slower on a CPU.", "bitsandbytes", True),
    "int8": Quantization("8 bits (int8)", "About a quarter of the memory; slower on a CPU.", "bitsandbytes", True),
}


def bad_option(error: jsonschema.ValidationError, row: dict[str, Any]) -> str:
    """A bad value, what is allowed, and a sensible one: the default."""
    path = [str(p) for p in error.absolute_path]
    schema = row["schema"]["properties"].get(path[0], {}) if path else {}
    usual = json.dumps(row["defaults"].get(path[0], None), ensure_ascii=False) if path else ""
    value = json.dumps(error.instance, ensure_ascii=False, default=str)[:80]
    near = did_you_mean(error.instance, schema["enum"]) if isinstance(error.instance, str) and "enum" in schema else ""
    return f"option '{'.'.join(path)}' is {value}; allowed: {in_words(schema)}; usual: {usual}.{near}".rstrip(".")


BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}


def in_words(schema: dict[str, Any]) -> str:
    """The JSON Schema of one field: `integer from 1 to 1024 or null`."""
    if "$ref" in schema:
        return {"Part": "a part", "Mix": "list or object"}[schema["$ref"].rpartition("/")[2]]
    if schema.get("type") == "array" and "$ref" in schema.get("items", {}):
        return "list of parts"
    if "anyOf" in schema:
        return " or ".join(in_words(s) for s in schema["anyOf"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{v}`" for v in schema["enum"])
    kind = "list" if schema.get("type") == "array" else str(schema.get("type", "any"))
    bounds = [f" {word} {schema[key]}" for key, word in BOUNDS.items() if key in schema]
    return kind + "".join(bounds)
