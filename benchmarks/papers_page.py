"""docs/papers.md: each method's paper and equation (from the head of its file), our settings, our number."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path

from benchmarks.methods_page import gain
from tunewright.tuners import TUNERS

PAGE = Path(__file__).parent.parent / "docs" / "papers.md"
ROOT = Path(__file__).parent.parent
TOP = """# Papers

Written by `make methods-table`; do not edit. For each method what it computes and where that is from, as its file says
it, our default settings, and what it gained on the demo at them (nats a trained token on held-out rows, mean of the
seeds; [all numbers](methods.md)).

| method | paper, equation | file | our settings | our gain |
|---|---|---|---|---|
"""


def write_papers(results: Path) -> None:
    PAGE.write_text(TOP + "".join(line(name, results / "demo") for name in TUNERS), encoding="utf-8")


def line(name: str, results: Path) -> str:
    """A row of the table."""
    entry = TUNERS.load(name)
    module = importlib.import_module(entry.__module__)
    path = Path(str(module.__file__))
    said = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
    linked = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", said)
    options = entry.Options().model_dump() if not _required(entry) else {}
    settings = ", ".join(f"{key} {value}" for key, value in options.items() if value is not None)
    runs = [json.loads(p.read_text()) for p in sorted(results.glob(f"{name}-*.json"))]
    number = f"{gain(runs).value:.3f}" if runs else ""
    where = path.relative_to(ROOT)
    cells = (f"`{name}`", linked.replace("|", "\\|"), f"[{where.name}](../{where})", settings, number)
    return f"| {' | '.join(cells)} |\n"


def _required(entry: type) -> bool:
    return any(field.is_required() for field in entry.Options.model_fields.values())  # type: ignore[attr-defined]
