"""`python -m tunewright.train.combine '{…}'`: combine saved adapters, in a process with torch. See tuners/combine.py.

The one argument is JSON: base, sources, target, and the options of `combine`. An error is its message on stderr.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tunewright.core.errors import TunewrightError
from tunewright.core.home import find_home
from tunewright.models.loader import load_model, materialise
from tunewright.tuners.combine import FIRST_RANKS, check, combine


def main(asked: dict[str, Any]) -> None:
    base, target = asked.pop("base"), Path(asked.pop("target"))
    sources = [Path(p) for p in asked.pop("sources")]
    if asked["how"] == FIRST_RANKS:
        combine(None, sources, target, **asked)
        return
    check(sources, *(asked[k] for k in ("how", "weights", "rank", "density")))  # before the base is loaded
    combine(load_model(materialise(base, find_home())), sources, target, base=base, **asked)


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except TunewrightError as e:
        sys.exit(e.message)
