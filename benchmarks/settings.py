"""What a comparison is about: its command line, the split of the rows, and what the rows are as tokens."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gates import Tokens
from benchmarks.process import epoch_order, temporary_home
from benchmarks.rivals.shared import Row, Task, token_hash
from benchmarks.table import DEFAULT, RIVALS
from tunewright.core.example import Group
from tunewright.core.home import Home, find_home
from tunewright.data.render import render_rows
from tunewright.data.tokenizer import Tokenizer
from tunewright.data.validate import read_conversations

HELD_OUT_ROWS = 16
EXACT_ROWS = 4
LONG_ROWS = 600
GATE_TOKENS = 6000
RATES = {"lora": 2e-4, "full": 2e-5}
MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Settings:
    """One comparison. model: as the job spec has it; folder: its files. mean_tokens, supervised: of the training rows.

    train, held_out, gate, exact: files made from the data. gate_steps: steps of the gates' short runs.
    """

    model: str
    folder: Path
    home: Home
    work: Path
    tuner: str
    batch: int
    lr: float
    dtype: str
    threads: int
    rounds: int
    seconds: float
    min_steps: int
    budget_s: float
    only: tuple[str, ...]
    with_gates: bool
    gate_steps: int
    gate_tokens: Tokens
    mean_tokens: float
    supervised: float
    train: Path
    held_out: Path
    gate: Path
    exact: Path

    def task(self, name: str, data: Path, **changes: object) -> Task:
        """A process's task; name: of its folder."""
        values = {
            "model": str(self.folder),
            "data": str(data),
            "out": str(self.work / name),
            "tuner": self.tuner,
            "batch": self.batch,
            "lr": self.lr,
            "dtype": self.dtype,
            "threads": self.threads,
            "seconds": self.seconds,
            "min_steps": self.min_steps,
        }
        return Task(**{**values, **changes})  # type: ignore[arg-type]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all comparisons have."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=MODEL, help="a name of the catalogue or a folder (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="each rival is measured so often, in turns (%(default)s)")
    p.add_argument("--seconds", type=float, default=120.0, help="length of a measured window (%(default)s)")
    p.add_argument("--min-steps", type=int, default=20, help="this many steps end a window early (%(default)s)")
    p.add_argument("--minutes", type=float, default=45.0, help="time for everything; windows shrink (%(default)s)")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each rival (all cores)")
    p.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of the products")
    p.add_argument("--json", default=None, metavar="FILE", help="write the result there; - prints it")
    return p


def sft_parser(description: str | None) -> argparse.ArgumentParser:
    p = parser(description)
    p.add_argument(
        "--data", type=Path, required=True, help="prompt/completion rows, such as benchmarks/data/mixed.jsonl"
    )
    p.add_argument("--tuner", choices=tuple(RATES), default="lora", help="what is trained (%(default)s)")
    p.add_argument("--only", default=",".join(DEFAULT), help=f"rivals, from {', '.join(RIVALS)}")
    p.add_argument("--batch", type=int, default=None, help=f"rows a step (8; 4 from {LONG_ROWS} tokens a row on)")
    p.add_argument("--shape", choices=("1b", "8b"), default=None, help="random weights of that size instead of --model")
    p.add_argument("--gate-steps", type=int, default=None, help="steps of the gates' short runs (2 to 10, by length)")
    p.add_argument("--no-gates", action="store_true", help="do not compare numbers first; the result says so")
    return p


@contextmanager
def prepared(args: argparse.Namespace) -> Iterator[Settings]:
    """The settings of a command line, their files in a temporary folder for the time of the block."""
    from benchmarks.shapes import make_shape
    from tunewright.models.loader import materialise
    from tunewright.ops.runtime import choose_dtype

    only = tuple(args.only.split(","))
    unknown = [name for name in only if name not in RIVALS]
    if unknown:
        sys.exit(f"--only: there is no rival {', '.join(unknown)}. Use some of: {', '.join(RIVALS)}")
    real = find_home().ensure()
    model = make_shape(args.shape, args.model, real) if args.shape else args.model
    folder = materialise(model, real)
    with TemporaryDirectory(prefix="tunewright-bench-") as place:
        work = Path(place)
        home = temporary_home(real, work / "home")
        rows = args.data.read_text(encoding="utf-8").splitlines()
        tokens = tokenise(args.data, folder)
        mean = sum(len(r.ids) for r in tokens) / len(tokens)
        batch = args.batch or (8 if mean < LONG_ROWS else 4)
        n = (len(rows) - HELD_OUT_ROWS) // batch * batch
        if n < 2 * batch:
            sys.exit(f"--data: {args.data} has {len(rows)} rows; {2 * batch + HELD_OUT_ROWS} are needed")
        steps = min(n // batch, args.gate_steps or max(2, min(10, round(GATE_TOKENS / (mean * batch)))))
        chosen = gate_rows(n, steps * batch)
        yield Settings(
            model=model,
            folder=folder,
            home=home,
            work=work,
            tuner=args.tuner,
            batch=batch,
            lr=RATES[args.tuner],
            dtype=str(choose_dtype(args.dtype)).removeprefix("torch."),
            threads=args.threads,
            rounds=args.rounds,
            seconds=args.seconds,
            min_steps=args.min_steps,
            budget_s=args.minutes * 60,
            only=only,
            with_gates=not args.no_gates,
            gate_steps=steps,
            gate_tokens=step_tokens([tokens[i] for i in chosen], batch),
            mean_tokens=sum(len(r.ids) for r in tokens[:n]) / n,
            supervised=sum(r.supervised for r in tokens[:n]) / sum(len(r.ids) for r in tokens[:n]),
            train=write(work / "train.jsonl", rows[:n]),
            held_out=write(work / "held_out.jsonl", rows[-HELD_OUT_ROWS:]),
            gate=write(work / "gate.jsonl", [rows[i] for i in chosen]),
            exact=write(work / "exact.jsonl", sorted(rows[:n], key=len)[:EXACT_ROWS]),
        )


def gate_rows(n: int, wanted: int, seed: int = Task.seed) -> list[int]:
    """Which of n rows, in which order, make a file whose first epoch is the first `wanted` rows of the whole file's."""
    first = epoch_order(n, seed)[:wanted]
    rows = [0] * wanted
    for place, row in zip(epoch_order(wanted, seed), first, strict=True):
        rows[place] = row
    return rows


def step_tokens(rows: Sequence[Row], batch: int, seed: int = Task.seed) -> Tokens:
    ordered = [rows[i] for i in epoch_order(len(rows), seed)]
    groups = [ordered[k : k + batch] for k in range(0, len(rows), batch)]
    counts = [(sum(len(r.ids) for r in g), sum(r.supervised for r in g)) for g in groups]
    return Tokens(token_hash(list(rows)), counts)


def tokenise(data: Path, folder: Path) -> list[Row]:
    """The rows as our worker reads them: our formats, template and loss mask."""
    found: list[Group] = list(
        render_rows(
            read_conversations(data, "prompt_completion", data.name),
            Tokenizer.load(folder, now=datetime.now()),
            max_length=1 << 20,
        )
    )
    return [Row(list(e.ids), [int(w > 0) for w in e.weights]) for g in found for e in g.examples]


def write(path: Path, rows: Sequence[str]) -> Path:
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    return path


def save(result: dict[str, object], where: str | None) -> None:
    """Write a result as JSON to a file, or to stdout for `-`."""
    text = json.dumps(result, indent=2)
    if where == "-":
        print(text)
    elif where:
        Path(where).write_text(text + "\n")


def stop_like_ctrl_c() -> None:
    """SIGTERM ends a benchmark as Ctrl-C does: the process it measures is ended too, and what was measured is kept.

    SIGINT is named too because a shell's background jobs inherit that it is ignored, and Python then leaves it so.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)


def say(text: str) -> None:
    """Progress goes to stderr, so that stdout can be JSON."""
    print(text, file=sys.stderr, flush=True)
