"""What is forgotten, and what holds it: plain training against replay, KL, EWC and L2-SP at the same budget.

    python -m benchmarks.retain [--data FILE] [--source WORDS] [--only plain,ewc] [--seeds 3]

A real model learns the demo's rows with LoRA: the same rows, steps and rate with every method, the methods at their
defaults. The old task is text that it could write before; the retained rows are another part of it. Without --data that
is Python's manual, with it chat rows. Each run leaves one JSON file under results/retain/: what is there is not run
again, so Ctrl-C loses nothing. At the end docs/methods.md is written.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.figures import machine
from benchmarks.methods import closure, mean
from benchmarks.methods import demo as demo_rows
from benchmarks.methods_page import PAGE, write_page
from benchmarks.methods_score import CHARACTERS, UNRELATED, Judge, Rows, manual, read_rows, unrelated
from benchmarks.ours import Place, own_parser, placed
from benchmarks.pieces import Piece, key_of, run_pieces
from benchmarks.process import Outcome, run_ours
from benchmarks.rivals.shared import Task
from benchmarks.settings import say, stop_like_ctrl_c
from tunewright.core.durable import sha256_file
from tunewright.core.spec import JobSpec
from tunewright.train.retain import RETAIN
from tunewright.tuners import TUNERS

RESULTS = Path(__file__).parent / "results" / "retain"
PLAIN, TUNER = "plain", "lora"
SETTINGS = {"tuner": TUNER, "n_epochs": 1, "batch_size": 8, "learning_rate": "auto"}
ROWS = "the retained rows"  # stands for their file
# rows of each task that are judged; of a file given by --data: rows that are retained, how long one is in characters
JUDGED, RETAINED, LONGEST = 64, 128, 1200
Parts = list[dict[str, Any]]


@dataclass(frozen=True)
class Old:
    """The old task. retained: a file of its rows; judged: other rows of it. source, sha256: of all of them."""

    name: str
    source: str
    sha256: str
    retained: Path
    judged: Rows


def of_manual(work: Path) -> Old:
    """Pages of Python's manual: the beginnings of the longest are judged, pieces of the others retained."""
    pages = manual()[UNRELATED:]
    pieces = [page[i : i + CHARACTERS] for page in pages for i in range(0, len(page), CHARACTERS)]
    path = _written(work / "manual.jsonl", [json.dumps({"text": piece}) for piece in pieces])
    return Old("manual", "Python's manual", key_of(manual()), path, unrelated)


def of_chats(data: Path, work: Path, source: str) -> Old:
    """Rows of a file: the last ones are judged, the first ones retained."""
    rows = [row for row in data.read_text(encoding="utf-8").splitlines() if 0 < len(row) <= LONGEST]
    if len(rows) < 2 * JUDGED:
        sys.exit(f"--data: {data} has {len(rows)} rows of at most {LONGEST} characters; {2 * JUDGED} are needed, of "
                 f"which {JUDGED} are judged and the others retained.")  # fmt: skip
    judged = _written(work / f"{data.stem}-judged.jsonl", rows[-JUDGED:])
    path = _written(work / f"{data.stem}-retained.jsonl", rows[:-JUDGED][:RETAINED])
    return Old(data.stem, source or data.name, sha256_file(data)[:16], path, partial(read_rows, judged))


def _written(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def methods() -> dict[str, Parts]:
    """{name: the job's `retain`}: none, every method of the table, and again without rows where it can do without."""
    found: dict[str, Parts] = {PLAIN: []}
    for name in RETAIN:
        needs = RETAIN.load(name).card.rows
        if needs != "none":
            found[name] = [{"name": name, "file": ROWS}]
        if needs != "required":
            found[name if needs == "none" else f"{name}_alone"] = [{"name": name}]
    return found


def options(parts: Parts) -> dict[str, Any]:
    """Of a job's one method, defaults filled in."""
    return {k: v for part in parts for k, v in _options(**part).items() if k != "file"}


def _options(name: str, **given: Any) -> dict[str, Any]:
    return RETAIN.load(name).Options(**given).model_dump()


def _uses_rows(parts: Parts) -> bool:
    return any("file" in part for part in parts)


def key(model: str, old: Old, parts: Parts) -> str:
    """Of the model, the data, the settings, the method's code and its defaults."""
    modules = {*closure(TUNERS.load(TUNER).__module__)}
    modules |= {name for part in parts for name in closure(RETAIN.load(part["name"]).__module__)}
    sources = [Path(str(import_module(name).__file__)) for name in sorted(modules)]
    sizes = [UNRELATED, CHARACTERS, JUDGED, LONGEST, RETAINED if _uses_rows(parts) else 0]
    return key_of([model, SETTINGS, sizes, parts, options(parts), old.sha256, demo_rows().sha256], sources)


def pieces(place: Place, old: Old, chosen: Mapping[str, Parts], seeds: int) -> Iterator[Piece]:
    """All methods' first seeds come first."""
    new = _written(place.work / "new.jsonl", demo_rows().held_out.read_text(encoding="utf-8").splitlines()[:JUDGED])
    judge = cache(lambda: Judge(place.model, place.home, new, old.judged, half=True))
    for seed in range(1, seeds + 1):
        for method, parts in chosen.items():
            path = RESULTS / old.name / f"{method}-{seed}.json"
            run = partial(measure, place, old, judge, method, parts, seed)
            yield Piece(f"old task {old.name}: {method}, seed {seed}", path, key(place.model, old, parts), run)


def train(place: Place, old: Old, parts: Parts, seed: int) -> Outcome:
    """One job; its run folder is left."""
    held = [{k: str(old.retained) if v == ROWS else v for k, v in part.items()} for part in parts]
    schedule = JobSpec.model_fields["schedule"].default.model_dump()
    task = Task(model=place.model, data=str(demo_rows().train), out=str(place.work / "retain"), seed=seed,
                batch=SETTINGS["batch_size"], epochs=SETTINGS["n_epochs"], steps=1 << 30, threads=place.threads,
                dtype=place.dtype, options={**SETTINGS, "schedule": schedule, "retain": held})  # fmt: skip
    return run_ours(task, place.model, place.home, limit_s=3600.0)


def measure(place: Place, old: Old, judge: Callable[[], Judge], method: str, parts: Parts, seed: int) -> dict[str, Any]:
    """Train, judge, and forget the run folder."""
    about, outcome = machine(place.threads), train(place, old, parts, seed)
    run, plan, end = Path(outcome.facts["run"]), outcome.facts["plan"], outcome.facts["end"]
    try:
        losses = judge().of(run / "result")
    finally:
        shutil.rmtree(run, ignore_errors=True)
    base = judge().base
    return {
        "method": method,
        "seed": seed,
        "options": options(parts),
        "retained": sum(1 for _ in old.retained.open("rb")) if _uses_rows(parts) else 0,
        "model": place.model,
        "settings": SETTINGS,
        "data": {"name": "demo", "source": demo_rows().source, "sha256": demo_rows().sha256},
        "old_task": {"name": old.name, "source": old.source, "sha256": old.sha256},
        "base": {"held_out": base["held_out"], "old": base["unrelated"]},
        "held_out": losses["held_out"],
        "old": losses["unrelated"],
        "steps": end["steps"],
        "trained_tokens": end["trained_tokens"],
        "seconds": end["seconds"],
        "learning_rate": plan["learning_rate"],
        "path": plan["path"],
        "versions": outcome.facts["versions"],
        "machine": about,
    }


def tell(found: dict[str, Any]) -> str:
    new, old = ([mean(found["base"][k]), mean(found[k])] for k in ("held_out", "old"))
    return f"demo {new[0]:.3f} -> {new[1]:.3f}, old task {old[0]:.3f} -> {old[1]:.3f}"


def parser() -> argparse.ArgumentParser:
    p = own_parser(__doc__)
    p.add_argument("--data", type=Path, metavar="FILE", help=f"chat rows of the old task, the last {JUDGED} judged")
    p.add_argument("--source", default="", help="where --data comes from, as the table shall say it")
    p.add_argument("--only", default="", metavar="NAMES", help=f"some methods, from {', '.join(methods())}")
    p.add_argument("--seeds", type=int, default=3, help="jobs of each method (%(default)s)")
    return p


def chosen(names: str) -> dict[str, Parts]:
    """The methods of --only, in the table's order; all without it."""
    known, asked = methods(), names.split(",") if names else []
    unknown = [name for name in asked if name not in known]
    if unknown:
        sys.exit(f"--only: there is no method {', '.join(unknown)}. Use some of: {', '.join(known)}")
    return {name: parts for name, parts in known.items() if not asked or name in asked}


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    asked = chosen(args.only)
    stop_like_ctrl_c()
    with placed(args) as place:
        old = of_chats(args.data, place.work, args.source) if args.data else of_manual(place.work)
        try:
            failed = run_pieces(pieces(place, old, asked, args.seeds), tell)
        except KeyboardInterrupt:
            say("Stopped. What was measured is kept; the same command goes on.")
            return 130
    write_page()
    say(f"{PAGE} is written." + (f" {failed} runs failed." if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
