"""The rows of the objectives' trials: the demo as a task of two labels, its pairs, and public files in our formats.

Everything is a function of the files alone: the same rows whatever the seed, the last ones held out.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunewright.core.durable import sha256_file
from tunewright.data.demo import DEPARTMENTS, HELDOUT, TRAIN, URGENCIES, ClinicRow, load

Rows = list[dict[str, Any]]
# of the demo's 300 training rows the first ones make the start, a model that knows the task a little
START = 100
# held out of the public files
PAIRS, DIALOGUES, TEXTS = 60, 450, 50
FILES = {"dpo_en": "dpo_en.jsonl", "hh": "hh_harmless.jsonl", "c4": "c4_text.jsonl"}


@dataclass(frozen=True)
class Rowset:
    """name: in tables. source: where the rows come from. sha256: of the files, 16 digits."""

    name: str
    source: str
    sha256: str
    train: Rows
    held_out: Rows

    def cut(self, n: int | None) -> Rowset:
        """At most n rows of each part."""
        return self if n is None else Rowset(self.name, self.source, self.sha256, self.train[:n], self.held_out[:n])


def answer(department: str, urgency: str) -> str:
    return json.dumps({"department": department, "urgency": urgency})


def sorted_messages(rows: Sequence[ClinicRow]) -> Rows:
    """Chat rows: a patient's message -> department and urgency as JSON."""
    return [{"messages": [*_asked(row), _said(answer(row.department, row.urgency))]} for row in rows]


def demo_chats() -> Rowset:
    """The demo's own rows, as `tunewright demo` trains on them."""
    parts = [[json.loads(line) for line in f.read_text(encoding="utf-8").splitlines()] for f in (TRAIN, HELDOUT)]
    return _demo(*parts)


def demo_prompts() -> Rowset:
    """What the start was not trained on; `department` is for graders."""
    return _demo(*(_graded(part) for part in (load(TRAIN)[START:], load(HELDOUT))))


def demo_start() -> Rows:
    return sorted_messages(load(TRAIN)[:START])


def demo_pairs() -> Rowset:
    """The right answer against one with another department or urgency; of rows that the start does not know."""
    return _demo(*([_corrupted(i, row) for i, row in enumerate(part)] for part in (load(TRAIN)[START:], load(HELDOUT))))


def demo_marks() -> Rowset:
    """Single answers of these pairs, good and bad in turn; held out are pairs."""
    pairs = demo_pairs()
    return _demo([_marked(row, good=i % 2 == 0) for i, row in enumerate(pairs.train)], pairs.held_out)


def demo_labels() -> Rowset:
    """The message and its department."""
    return _demo(*([{"text": r.message, "label": r.department} for r in load(f)] for f in (TRAIN, HELDOUT)))


def _demo(train: Rows, held_out: Rows) -> Rowset:
    digest = hashlib.sha256((sha256_file(TRAIN) + sha256_file(HELDOUT)).encode()).hexdigest()[:16]
    return Rowset("demo", "the demo's messages to a clinic, of our own making", digest, train, held_out)


def _graded(part: Sequence[ClinicRow]) -> Rows:
    return [{**row, "department": known.department} for row, known in zip(sorted_messages(part), part, strict=True)]


def _asked(row: ClinicRow) -> Rows:
    return [{"role": "user", "content": row.message}]


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _corrupted(i: int, row: ClinicRow) -> dict[str, Any]:
    rng = random.Random(f"pair/{i}/{row.message}")
    right = {"department": row.department, "urgency": row.urgency}
    field, known = rng.choice([("department", DEPARTMENTS), ("urgency", URGENCIES)])
    wrong = {**right, field: rng.choice([value for value in known if value != right[field]])}
    return _pair(_asked(row), answer(**right), answer(**wrong))


def _pair(prompt: Rows, preferred: str, other: str) -> dict[str, Any]:
    return {
        "input": {"messages": prompt},
        "preferred_output": [_said(preferred)],
        "non_preferred_output": [_said(other)],
    }


def _marked(pair: dict[str, Any], good: bool) -> dict[str, Any]:
    said = pair["preferred_output" if good else "non_preferred_output"]
    return {"prompt": pair["input"]["messages"], "completion": said[0]["content"], "label": good}


def public(folder: Path, name: str) -> Rowset | None:
    """The rows of a public set, None if the folder does not have its file."""
    path = folder / FILES[name]
    if not path.is_file():
        return None
    rows, kept = READ[name]([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    return Rowset(path.stem, path.name, sha256_file(path)[:16], rows[:-kept], rows[-kept:])


def turns(text: str) -> Rows:
    """The messages of a dialogue of "Human:" and "Assistant:"."""
    parts = re.split(r"\n\n(Human|Assistant): ?", text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[r], "content": c} for r, c in zip(parts[::2], parts[1::2], strict=True)]


def dialogue_pairs(rows: Rows) -> Rows:
    """The dialogues whose sides differ in the last answer alone, and have no empty message."""
    found = []
    for row in rows:
        good, bad = turns(row["chosen"]), turns(row["rejected"])
        usable = good[:-1] == bad[:-1] and good[-1] != bad[-1] and all(m["content"].strip() for m in (*good, *bad))
        if usable and good[-1]["role"] == bad[-1]["role"] == "assistant":
            found.append(_pair(good[:-1], good[-1]["content"], bad[-1]["content"]))
    return found


READ = {
    "dpo_en": lambda rows: (rows, PAIRS),
    "hh": lambda rows: (dialogue_pairs(rows), DIALOGUES),
    "c4": lambda rows: (rows, TEXTS),
}
