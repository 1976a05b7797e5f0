"""The demo data set: a patient's message to an online clinic -> JSON with department, urgency and a reason.

README.md beside this file says how it was made and by which rules its labels were given.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
TRAIN = FOLDER / "clinic_train.jsonl"
HELDOUT = FOLDER / "clinic_heldout.jsonl"
DEPARTMENTS = (
    "administration",
    "cardiology",
    "dentistry",
    "dermatology",
    "gastroenterology",
    "mental_health",
    "ophthalmology",
    "orthopedics",
)
URGENCIES = ("emergency", "urgent", "routine")


@dataclass(frozen=True)
class ClinicRow:
    """One row. answer: the assistant's turn as it stands in the file, a JSON text."""

    message: str
    answer: str
    department: str
    urgency: str
    reason: str


def load(path: Path) -> list[ClinicRow]:
    """The rows of one of the two files, in the file's order."""
    return [_row(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _row(raw: dict[str, list[dict[str, str]]]) -> ClinicRow:
    user, assistant = raw["messages"]
    return ClinicRow(user["content"], assistant["content"], **json.loads(assistant["content"]))
