"""Every method of the tuners' table on a real model and real rows: what it gains, costs, forgets and leaves.

    make methods-table        or        python -m benchmarks.methods [--data FILE] [--only lora,dora] [--seeds 3]

One job a method and seed through the real worker, at the method's own defaults. Each leaves one JSON file under
results/methods/, keyed by a hash of the method's code and of these settings: what is there is not run again, so Ctrl-C
loses nothing. At the end docs/methods.md and docs/papers.md are written from the files.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.figures import machine
from benchmarks.methods_page import PAGE, write_page
from benchmarks.methods_score import Judge, answers_of
from benchmarks.ours import Place, own_parser, placed
from benchmarks.papers_page import PAGE as PAPERS
from benchmarks.papers_page import write_papers
from benchmarks.pieces import Piece, run_pieces
from benchmarks.process import Outcome
from benchmarks.settings import say, stop_like_ctrl_c
from tunewright.core.durable import sha256_file
from tunewright.core.spec import JobSpec
from tunewright.data.demo import HELDOUT, TRAIN
from tunewright.tuners import TUNERS

RESULTS = Path(__file__).parent / "results" / "methods"
# options without which a method cannot train this model
NEEDED: dict[str, dict[str, Any]] = {"bitfit": {"add_biases": True}}
EPOCHS, BATCH, HELD_OUT_ROWS = 3, 8, 100
SETTINGS = {"n_epochs": EPOCHS, "batch_size": BATCH, "learning_rate": "auto"}


@dataclass(frozen=True)
class Data:
    """name: in tables and file names. train, held_out: files of chat rows. source: where they come from."""

    name: str
    train: Path
    held_out: Path
    source: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256((sha256_file(self.train) + sha256_file(self.held_out)).encode()).hexdigest()[:16]


def demo() -> Data:
    return Data("demo", TRAIN, HELDOUT, "the demo's messages to a clinic, of our own making")


def split(path: Path, work: Path, source: str) -> Data:
    """Rows of a public file: the last HELD_OUT_ROWS are held out."""
    rows = path.read_text(encoding="utf-8").splitlines()
    if len(rows) < 2 * HELD_OUT_ROWS:
        sys.exit(
            f"--data: {path} has {len(rows)} rows; {2 * HELD_OUT_ROWS} are needed, as {HELD_OUT_ROWS} are held out."
        )
    parts = {"train": rows[:-HELD_OUT_ROWS], "held_out": rows[-HELD_OUT_ROWS:]}
    files = {}
    for name, lines in parts.items():
        files[name] = work / f"{path.stem}-{name}.jsonl"
        files[name].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Data(path.stem, files["train"], files["held_out"], source or path.name)


def code_key(method: str) -> str:
    """Hash of the method's module, of what it imports from the tuners, and of the settings."""
    module = TUNERS.load(method).__module__
    text = json.dumps([SETTINGS, NEEDED.get(method, {})], sort_keys=True)
    sources = "".join(Path(str(import_module(name).__file__)).read_text() for name in sorted(closure(module)))
    return hashlib.sha256((text + sources).encode()).hexdigest()[:16]


def closure(module: str, seen: frozenset[str] = frozenset()) -> frozenset[str]:
    """The module and all that it imports from its own package."""
    if module in seen:
        return seen
    seen |= {module}
    package = module.rpartition(".")[0]
    tree = ast.parse(Path(str(import_module(module).__file__)).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(package):
            names = [node.module] if node.module != package else [f"{package}.{a.name}" for a in node.names]
            for name in names:
                seen = closure(name, seen) if _is_module(name) else seen
    return seen


def _is_module(name: str) -> bool:
    try:
        return import_module(name).__file__ is not None
    except ModuleNotFoundError:
        return False


def train(place: Place, data: Data, method: str, seed: int) -> Outcome:
    """One job at the method's defaults; its run folder is left."""
    from benchmarks.process import run_ours
    from benchmarks.rivals.shared import Task

    tuner = {"name": method, **NEEDED.get(method, {})}
    options = {**SETTINGS, "tuner": tuner, "schedule": JobSpec.model_fields["schedule"].default.model_dump()}
    task = Task(model=place.model, data=str(data.train), out=str(place.work / f"{data.name}-{method}-{seed}"),
                batch=BATCH, epochs=EPOCHS, seed=seed, steps=1 << 30, threads=place.threads, dtype=place.dtype,
                options=options)  # fmt: skip
    return run_ours(task, place.model, place.home, limit_s=3600.0)


def measure(place: Place, data: Data, judge: Callable[[], Judge], method: str, seed: int) -> dict[str, Any]:
    """Train, judge, and forget the run folder."""
    about, outcome = machine(place.threads), train(place, data, method, seed)
    run, plan, end = Path(outcome.facts["run"]), outcome.facts["plan"], outcome.facts["end"]
    try:
        losses = judge().of(run / "result")
        said = answers_of(place.home, run / "result") if data.name == "demo" else {}
        size = sum(p.stat().st_size for p in (run / "result").glob("*.safetensors"))
    finally:
        shutil.rmtree(run, ignore_errors=True)
    return {
        "method": method,
        "seed": seed,
        "model": place.model,
        "settings": SETTINGS,
        "data": {"name": data.name, "source": data.source, "sha256": data.sha256},
        "base": judge().base,
        "trainable": plan["trainable_parameters"],
        "parameters": plan["parameters"],
        "learning_rate": plan["learning_rate"],
        "path": plan["path"],
        "tokens_per_second": end["trained_tokens"] / end["seconds"],
        "seconds": end["seconds"],
        "peak_bytes": outcome.peak_bytes,
        "predicted_peak_bytes": end["predicted_peak_memory_bytes"],
        "artefact_bytes": size,
        "held_out": losses["held_out"],
        "unrelated": losses["unrelated"],
        "outcomes": said,
        "versions": outcome.facts["versions"],
        "machine": about,
    }


def pieces(place: Place, data: Data, methods: Iterable[str], seeds: int) -> Iterator[Piece]:
    """All methods' first seeds come first."""
    judge = cache(lambda: Judge(place.model, place.home, data.held_out))
    for seed in range(1, seeds + 1):
        for method in methods:
            path, key = RESULTS / data.name / f"{method}-{seed}.json", f"{code_key(method)}-{data.sha256}"
            run = partial(measure, place, data, judge, method, seed)
            yield Piece(f"{data.name}: {method}, seed {seed}", path, key, run)


def tell(found: dict[str, Any]) -> str:
    held, other = ([mean(found["base"][k]), mean(found[k])] for k in ("held_out", "unrelated"))
    return (f"{found['tokens_per_second']:,.0f} tokens/s, {found['seconds']:.0f} s, held-out loss {held[0]:.3f} -> "
            f"{held[1]:.3f}, unrelated {other[0]:.3f} -> {other[1]:.3f}")  # fmt: skip


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def parser() -> argparse.ArgumentParser:
    p = own_parser(__doc__)
    p.add_argument("--data", type=Path, action="append", default=[], metavar="FILE",
                   help="also on these chat rows, the last 100 of them held out (may be repeated)")  # fmt: skip
    p.add_argument("--source", default="", help="where --data comes from, as the table shall say it")
    p.add_argument("--only", default="", help=f"some methods, from {', '.join(TUNERS)}")
    p.add_argument("--seeds", type=int, default=3, help="jobs of each method (%(default)s)")
    p.add_argument("--write", action="store_true", help="run nothing, write the page from the files that are there")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    methods = args.only.split(",") if args.only else list(TUNERS)
    for method in methods:
        TUNERS.load(method)  # an unknown name is refused here, with the nearest one
    stop_like_ctrl_c()
    failed = 0
    if not args.write:
        with placed(args) as place:
            try:
                for data in (demo(), *(split(path, place.work, args.source) for path in args.data)):
                    failed += run_pieces(pieces(place, data, methods, args.seeds), tell)
            except KeyboardInterrupt:
                say("Stopped. What was measured is kept; the same command goes on.")
                return 130
    write_page()
    write_papers(RESULTS)
    say(f"{PAGE} and {PAPERS} are written." + (f" {failed} runs failed." if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
