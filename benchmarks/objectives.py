"""Every objective on a real model and real rows: does it do what it is for, on rows that it has not seen?

    python -m benchmarks.objectives [--data FOLDER] [--only dpo,kto] [--seeds 3]
    make objectives-table DATA=FOLDER

One trial an objective and seed, through the real worker at the objective's own defaults (objectives_trials.py). Each
leaves one JSON file under results/objectives/, keyed by a hash of its rows, its settings and the objective's code: what
is there is not run again, so Ctrl-C loses nothing. At the end the section "Measured" of docs/objectives.md is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from inspect import getsource
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.figures import machine
from benchmarks.methods import closure
from benchmarks.objectives_page import PAGE, RESULTS, write_section
from benchmarks.objectives_rows import FILES, Rowset
from benchmarks.objectives_rows import START as START_ROWS
from benchmarks.objectives_trials import FIXED, START, TRIALS, Bench, Done, Trial
from benchmarks.ours import Place, own_parser, placed
from benchmarks.pieces import Piece, key_of, run_pieces
from benchmarks.settings import say, stop_like_ctrl_c
from tunewright.core.home import Home
from tunewright.objectives import OBJECTIVES

ENCODER = "all-minilm-l6-v2"


def key(trial: Trial, rows: Rowset, models: Sequence[str]) -> str:
    """Of the rows themselves, of all settings, of the trial's function and of the objective's code."""
    settings = [FIXED, trial.spec, START if trial.from_start else {}]
    modules = sorted(closure(OBJECTIVES.load(trial.objective).__module__))
    sources = [Path(str(import_module(name).__file__)) for name in modules]
    asked = [trial.objective, getsource(trial.run), settings]
    return key_of([*asked, rows.train, rows.held_out, *models], sources)


def pieces(place: Place, args: argparse.Namespace, chosen: Mapping[str, Trial]) -> Iterator[Piece]:
    """All trials' first seeds come first."""
    kept: dict[str, Done] = {}
    for seed in range(1, args.seeds + 1):
        for name, trial in chosen.items():
            rows = trial.rows(args.data)
            if rows is None:
                continue
            bench, rows = Bench(place, seed, args.encoder, args.rows, kept), rows.cut(args.rows)
            measure = partial(measured, bench, name, trial, rows)
            what = f"{name} on {rows.name}, seed {seed}: about {trial.minutes:g} min of a free core"
            path, models = args.results / f"{name}-{seed}.json", (place.model, args.encoder)
            yield Piece(what, path, key(trial, rows, models), measure)


def measured(bench: Bench, name: str, trial: Trial, rows: Rowset) -> dict[str, Any]:
    """What is kept of one trial and seed."""
    about = machine(bench.place.threads)
    try:
        found = trial.run(bench, trial, rows)
    finally:
        bench.forget()
    data = {k: v for k, v in asdict(rows).items() if k in ("name", "source", "sha256")}
    settings = {"trial": name, "objective": trial.objective, "seed": bench.seed, "model": bench.place.model,
                "encoder": bench.encoder, "start_rows": START_ROWS}  # fmt: skip
    spec = {**trial.spec, **({"from": START} if trial.from_start else {})}
    return {**settings, "spec": spec, "data": {**data, "rows": len(rows.train)}, **found, "machine": about}


def tell(found: dict[str, Any]) -> str:
    verdict = TRIALS[found["trial"]].verdict([found])
    said = "as asked" if verdict.met else "NOT as asked"
    return f"{found['seconds']:.0f} s; {verdict.before} -> {verdict.after}; {verdict.change}: {said}"


@contextmanager
def own_answers(place: Place) -> Iterator[Place]:
    """The place with a cache whose kept answers, a judge's, go with it; kernels and the rest are the real one's."""
    with TemporaryDirectory(prefix="tunewright-trials-") as folder:
        home, cache = Home(Path(folder)), place.home.cache
        (cache / "kernels").mkdir(parents=True, exist_ok=True)
        home.cache.mkdir()
        home.models.symlink_to(place.home.models, target_is_directory=True)
        for entry in cache.iterdir():
            if entry.name != "answers":
                (home.cache / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
        yield replace(place, home=home.ensure())


def parser() -> argparse.ArgumentParser:
    p = own_parser(__doc__)
    p.add_argument(
        "--data", type=Path, metavar="FOLDER", help=f"public sets by their names: {', '.join(FILES.values())}"
    )
    p.add_argument("--only", default="", metavar="NAMES", help=f"some trials, from {', '.join(TRIALS)}")
    p.add_argument("--seeds", type=int, default=3, help="of each trial (%(default)s)")
    p.add_argument("--encoder", default=ENCODER, help="the model that learns to classify (%(default)s)")
    p.add_argument("--rows", type=int, metavar="N", help="at most N rows of each part, to try the trials themselves")
    p.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="of the JSON files (%(default)s)")
    p.add_argument("--write", action="store_true", help="run nothing, write the section from the files that are there")
    return p


def chosen(args: argparse.Namespace) -> dict[str, Trial]:
    """The trials of --only, in the table's order; all without it. Says which have no rows."""
    asked = args.only.split(",") if args.only else []
    unknown = [name for name in asked if name not in TRIALS]
    if unknown:
        sys.exit(f"--only: there is no trial {', '.join(unknown)}. Use some of: {', '.join(TRIALS)}")
    if args.rows and args.results == RESULTS:
        sys.exit("--rows: a trial on few rows is no result; give another folder with --results.")
    if args.data and not args.data.is_dir():
        sys.exit(f"--data: {args.data} is no folder; give one that has some of {', '.join(FILES.values())}.")
    found = {name: trial for name, trial in TRIALS.items() if not asked or name in asked}
    absent = [name for name, trial in found.items() if trial.rows(args.data) is None]
    if absent and not args.write:
        say(f"No rows for {', '.join(absent)}: --data names a folder with {', '.join(FILES.values())}.")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    trials, failed = chosen(args), 0
    stop_like_ctrl_c()
    if not args.write:
        with placed(args) as real, own_answers(real) as place:
            try:
                failed = run_pieces(pieces(place, args, trials), tell)
            except KeyboardInterrupt:
                say("Stopped. What was measured is kept; the same command goes on.")
                return 130
    if args.results == RESULTS:
        write_section()
        say(f"{PAGE} is written." + (f" {failed} runs failed." if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
