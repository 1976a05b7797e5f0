"""`python -m tunewright.train.describe`: every table entry's option schema, defaults and capabilities, as one JSON.

Option blocks live beside code that imports torch. The API, the command line, the create form and the docs read this
one file instead of importing it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from typing import Any

from tunewright.core.registry import Table
from tunewright.objectives import OBJECTIVES
from tunewright.train.optim import OPTIMIZERS, SCHEDULES
from tunewright.train.retain import RETAIN
from tunewright.tuners import TUNERS

TABLES: tuple[Table, ...] = (TUNERS, OBJECTIVES, OPTIMIZERS, SCHEDULES, RETAIN)


def describe_part(part: Any) -> dict[str, Any]:
    """{"schema": JSON Schema of the options, "defaults": {…}, "card": the capability row, "doc": first line}."""
    return {
        "schema": part.Options.model_json_schema(),
        "defaults": part.Options().model_dump(mode="json"),
        "card": asdict(part.card),
        "doc": (part.__doc__ or "").strip().split("\n")[0],
    }


@cache
def describe() -> dict[str, Any]:
    """{kind: {name: describe_part}} for every table, entry points included, and the versions it holds for. Made once a
    process: read it, do not change it."""
    tables = {table.kind: {name: describe_part(table.load(name)) for name in table} for table in TABLES}
    return {**tables, "versions": {p: version(p) for p in ("torch", "transformers", "peft")}}


if __name__ == "__main__":
    json.dump(describe(), sys.stdout, indent=2)
