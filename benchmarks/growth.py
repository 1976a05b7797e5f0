"""How tunewright grows: with the length of the rows, with their number, and with the size of the file.

    python -m benchmarks.growth --json growth.json

lengths: tokens/s at rows of 128 to 2,048 tokens. rows: seconds of a job with 1, 2 and 4 times the rows. memory: the
resident memory of a job over a file of 1,000 and of 1,000,000 rows, a few steps each. All files are made on the fly.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import figures, machine
from benchmarks.make_data import meeting
from benchmarks.ours import Place, own_parser, placed
from benchmarks.process import Outcome
from benchmarks.settings import save, say, stop_like_ctrl_c, tokenise
from tunewright.models.catalogue import resolve

LENGTHS = (128, 256, 512, 1024, 2048)
STEP_TOKENS = 4096
FACTORS = (1, 2, 4)
SIZES = (1_000, 1_000_000)
STEPS = 5


def row(text: str, answer: str) -> str:
    messages = ([{"role": "user", "content": text}], [{"role": "assistant", "content": answer}])
    return json.dumps(dict(zip(("prompt", "completion"), messages, strict=True)))


def rows_of_length(length: int, n: int, folder: Path, work: Path) -> Path:
    """A file of n rows of just about `length` tokens each, a quarter of them in the answer."""
    path = work / f"length-{length}.jsonl"
    share = 1.0
    for _ in range(4):  # words to tokens is not exact: measure, correct, make again
        path.write_text("".join(sized_row(i, round(length * share)) + "\n" for i in range(n)))
        found = [len(r.ids) for r in tokenise(path, folder)]
        share *= length / (sum(found) / n)
    return path


def sized_row(number: int, words: int) -> str:
    """About 1.3 tokens a word."""
    rng = random.Random(f"length/{number}")
    text = meeting(rng, max(8, words))[0].split()[: max(8, words)]
    cut = round(len(text) * 0.75)
    return row(" ".join(text[:cut]), " ".join(text[cut:]))


def lengths(place: Place, folder: Path, seconds: float) -> list[dict[str, Any]]:
    """tokens/s at each row length, the same tokens a step."""
    found = []
    for length in LENGTHS:
        batch = max(1, STEP_TOKENS // length)
        data = rows_of_length(length, 16 * batch, folder, place.work)
        outcome = place.run(f"length-{length}", data, batch=batch, seconds=seconds)
        got = figures(outcome, 1)
        found.append({"length": length, "batch": batch, **{k: got[k] for k in KEPT}})
        say(f"  rows of {length} tokens: {got['tokens_per_second']:,.0f} tokens/s, {got['peak_bytes'] / 1e9:.2f} GB")
    return found


KEPT = ("tokens_per_second", "supervised_per_second", "peak_bytes", "window_steps")


def numbers(place: Place, n: int, words: int) -> list[dict[str, Any]]:
    """Seconds of a whole job over n, 2n and 4n rows, one epoch each."""
    found = []
    for factor in FACTORS:
        data = place.work / f"rows-{factor}.jsonl"
        data.write_text("".join(sized_row(i, words) + "\n" for i in range(n * factor)))
        outcome = place.run(f"rows-{factor}", data, steps=1 << 30, epochs=1)
        end = outcome.facts["end"]
        found.append({"rows": n * factor, "seconds": end["seconds"], "wall_s": outcome.ended - outcome.started,
                      "seconds_per_row": end["seconds"] / (n * factor)})  # fmt: skip
        say(f"  {n * factor} rows: {end['seconds']:.1f} s, {1000 * end['seconds'] / (n * factor):.1f} ms a row")
    return found


def memory(place: Place, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Peak resident memory of a few steps over files of very different sizes."""
    found = []
    for size in sizes:
        data = place.work / f"size-{size}.jsonl"
        write_small_rows(data, size)
        say(f"  a file of {size:,} rows ({data.stat().st_size / 1e6:,.0f} MB)")
        outcome: Outcome = place.run(f"size-{size}", data, seconds=0.0, warm=STEPS)
        found.append({"rows": size, "file_bytes": data.stat().st_size, "peak_bytes": outcome.peak_bytes,
                      "startup_s": outcome.began - outcome.started, "steps": len(outcome.steps)})  # fmt: skip
        say(f"    {outcome.peak_bytes / 1e9:.2f} GB, first step after {outcome.began - outcome.started:.0f} s")
        data.unlink()
    return found


def write_small_rows(path: Path, n: int) -> None:
    """n different short rows, written as they are made; the longest come early, so all files have the same."""
    with open(path, "w", encoding="utf-8") as out:
        out.writelines(small_rows(n))


def small_rows(n: int) -> Iterable[str]:
    for i in range(n):
        extra = " ".join(["again"] * (i * 7 % 24))
        yield row(f"Please write down the number {i} {extra}", f"The number is {i}.") + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    p: argparse.ArgumentParser = own_parser(__doc__)
    p.add_argument("--seconds", type=float, default=60.0, help="window at each row length (%(default)s)")
    p.add_argument("--rows", type=int, default=200, help="rows of the smallest whole job (%(default)s)")
    p.add_argument("--words", type=int, default=90, help="words in each of those rows (%(default)s)")
    p.add_argument("--size", type=int, default=SIZES[1], help="rows of the large file (%(default)s)")
    p.add_argument("--only", default="lengths,rows,memory", help="parts to measure (%(default)s)")
    args = p.parse_args(argv)
    stop_like_ctrl_c()
    with placed(args) as place:
        folder = resolve(args.model, place.home).folder
        assert folder is not None
        parts = {
            "lengths": lambda: lengths(place, folder, args.seconds),
            "rows": lambda: numbers(place, args.rows, args.words),
            "memory": lambda: memory(place, (SIZES[0], args.size)),
        }
        found: dict[str, Any] = {"machine": machine(place.threads), "model": args.model}
        try:
            for name in args.only.split(","):
                say(name)
                found[name] = parts[name]()
        except KeyboardInterrupt:
            say("Stopped. What was measured so far is kept.")
    found["summary"] = summary(found)
    save(found, args.json)
    for name, value in found["summary"].items():
        say(f"{name}: {value:,.3g}")
    return 0


def summary(found: dict[str, Any]) -> dict[str, float]:
    """The three figures: tokens/s at the longest rows over those at 256; seconds a row at most over least; extra MB."""
    out = {}
    speeds = {r["length"]: r["tokens_per_second"] for r in found.get("lengths", [])}
    if 256 in speeds:
        out["tokens_per_second_2048_over_256"] = speeds[max(speeds)] / speeds[256]
    per_row = [r["seconds_per_row"] for r in found.get("rows", [])]
    if per_row:
        out["seconds_per_row_most_over_least"] = max(per_row) / min(per_row)
    peaks = [r["peak_bytes"] for r in found.get("memory", [])]
    if len(peaks) == 2:
        out["extra_memory_mb"] = (peaks[1] - peaks[0]) / 1e6
    return out


if __name__ == "__main__":
    sys.exit(main())
