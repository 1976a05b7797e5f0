"""The section "Measured" of docs/objectives.md, between its two marks, from the JSON files of benchmarks.objectives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.objectives_trials import TRIALS, Trial
from benchmarks.objectives_verdict import Runs

PAGE = Path(__file__).parent.parent / "docs" / "objectives.md"
RESULTS = Path(__file__).parent / "results" / "objectives"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

TOP = """## Measured

Written by `make objectives-table` from real runs; do not edit. The raw results are in `benchmarks/results/objectives/`.
Every objective ran at its own defaults on {model} ({encoder} for `classify`), threads: {threads} of {cpu}. Figures
are of held-out rows, each averaged over the seeds first; in brackets are 95 % intervals over the rows (paired
bootstrap, or Wilson's for a share alone).
"""
COLUMNS = (
    "trial", "data", "rows", "seeds", "learning rate", "epochs", "beside the defaults", "measured on held-out rows",
    "before", "after", "change", "asked: holds?",
)  # fmt: skip
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"

BOTTOM = """- **`*`**: from a model that knows the demo's task a little (supervised training on {start}
  of its rows, which the trial does not see again); the task is a message -> its department and urgency as JSON. The
  others start from the base model.
- **`before`** is the start's figure; where a name stands beside it, that of another way.
- **Rows**: trained on / held out. Public sets are named by file and hash: {sources}. The demo (hash `{demo}`) is in the
  package."""


def write_section() -> None:
    """Put the section between the marks of the page. Raises SystemExit if there are no results, or no marks."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    if not runs:
        raise SystemExit(f"{RESULTS} has no results yet; run python -m benchmarks.objectives without --write.")
    text = PAGE.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{PAGE} needs the lines '{BEGIN}' and '{END}', once each.")
    head, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{section(runs)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def section(runs: Runs) -> str:
    by_trial = {name: [r for r in runs if r["trial"] == name] for name in TRIALS}
    rows = [row(name, TRIALS[name], own) for name, own in by_trial.items() if own]
    absent = [f"`{name}`" for name, own in by_trial.items() if not own]
    one = runs[0]
    sources = {r["data"]["source"]: r["data"]["sha256"] for r in runs if r["data"]["name"] != "demo"}
    demo = next((r["data"]["sha256"] for r in runs if r["data"]["name"] == "demo"), "")
    told = {"model": one["model"], "encoder": one["encoder"], "threads": one["machine"]["threads"],
            "cpu": one["machine"]["cpu"], "start": one["start_rows"], "demo": demo,
            "sources": ", ".join(f"{k} (`{v}`)" for k, v in sorted(sources.items())) or "none yet"}  # fmt: skip
    lines = [TOP.format(**told), HEADER, *rows, "", BOTTOM.format(**told)]
    return "\n".join([*lines, *([f"- Not run yet: {', '.join(absent)}."] if absent else [])])


def row(name: str, trial: Trial, runs: Runs) -> str:
    """A line of the table."""
    found, first = trial.verdict(runs), runs[0]
    before = found.before if trial.before == "before" else f"{found.before} ({trial.before})"
    cells = (
        f"`{name}`" + ("*" if trial.from_start else ""),
        first["data"]["name"],
        f"{first['n_rows']} / {len(first['after'])}",
        str(len(runs)),
        f"{first['learning_rate']:g}",
        str(first["n_epochs"]),
        beside(first["spec"]),
        trial.measured,
        before,
        found.after,
        found.change,
        f"{trial.asked}: {'yes' if found.met else '**no**'}",
    )
    return f"| {' | '.join(cells)} |"


def beside(spec: Mapping[str, Any]) -> str:
    """What a trial's job says that its defaults do not; the grader, which the measure names, is left out."""
    objective = spec["objective"]
    options = {} if isinstance(objective, str) else {k: v for k, v in objective.items() if k not in ("name", "grader")}
    given = {k: v for k, v in spec.items() if k not in ("objective", "from")}
    return ", ".join(f"`{k}` {v}" for k, v in {**options, **given}.items())
