"""What does not go together, said in the form before anything is sent: a table of rules, each with its one reason.

A rule looks at one row of a table and at the draft; it returns why the row cannot be chosen now, or an empty text. The
API checks all of this again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Draft = dict[str, Any]
Row = dict[str, Any]
Rule = Callable[[Row, Draft, dict[str, Any]], str]


def missing(row: Row, draft: Draft, describe: dict[str, Any]) -> str:
    package = row.get("missing")
    return f"needs the package {package}: pip install {package} where the server runs" if package else ""


def over_quantised(tuner: Row, draft: Draft, describe: dict[str, Any]) -> str:
    """A tuner, where the base is to be held in few bits."""
    held = describe.get("quantization", {}).get(draft.get("quantization") or "auto", {}).get("card", {})
    if not held.get("frozen") or tuner["card"].get("works_on_nf4", True):
        return ""
    return f"trains the base itself, which {draft['quantization']} freezes"


def of_frozen_base(held: Row, draft: Draft, describe: dict[str, Any]) -> str:
    """A way to hold the base, where the chosen tuner trains it."""
    tuner = draft.get("tuner") or "lora"
    works = describe["tuner"].get(tuner, {}).get("card", {}).get("works_on_nf4", True)
    return f"{tuner} trains the base itself" if held["card"].get("frozen") and not works else ""


RULES: dict[str, tuple[Rule, ...]] = {
    "tuner": (missing, over_quantised),
    "quantization": (missing, of_frozen_base),
}


def unfit(kind: str, draft: Draft, describe: dict[str, Any]) -> dict[str, str]:
    """{name: the reason} of every row of a table that cannot be chosen beside what the draft has."""
    found = {}
    for name, row in describe.get(kind, {}).items():
        reasons = [why for rule in RULES.get(kind, (missing,)) if (why := rule(row, draft, describe))]
        if reasons:
            found[name] = reasons[0]
    return found
