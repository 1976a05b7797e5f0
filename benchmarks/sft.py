"""LoRA (or full) fine-tuning side by side: tunewright, TRL as it comes and at its best, a plain transformers loop.

    python -m benchmarks.sft --data benchmarks/data/mixed.jsonl --json mixed.json

Each rival trains the same rows with the same loss mask, batches, order, learning rate and threads, in a process of its
own, in turns (A B C D E, A B C D E, …). First the gates (gates.py): without the same numbers there is no comparison.
Ctrl-C keeps what was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.figures import figures, flops_per_token, machine, median_of, peak_flops, ratios
from benchmarks.gates import Gate, exact_gate, parity_gates
from benchmarks.process import Outcome, RivalFailed, run_one, run_rival
from benchmarks.settings import EXACT_ROWS, Settings, prepared, save, say, sft_parser, stop_like_ctrl_c
from benchmarks.table import RIVALS, TUNED, Rival, options_for

STARTUP_S = 30.0


@dataclass
class Progress:
    """Measured so far. versions: of each rival."""

    gates: list[Gate] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, Any] = field(default_factory=dict)
    held_out: dict[str, float] = field(default_factory=dict)
    complete: bool = False


def run_gates(s: Settings) -> Iterator[Gate]:
    """The float32 step of ours and plain, then a few steps of everybody (of plain in float32 too), then one judge over
    what they trained."""
    exact = {name: run(s, name, f"exact-{name}", s.exact, steps=1, epochs=1, batch=EXACT_ROWS, dtype="float32")
             for name in ("ours", "plain")}  # fmt: skip
    yield exact_gate(exact["ours"], exact["plain"])
    names = {"plain": s.dtype, "float32": "float32"}
    names |= dict.fromkeys((RIVALS[n].same_numbers_as or n for n in s.only), s.dtype)
    runs = {}
    for name, dtype in names.items():
        say(f"gates: {s.gate_steps} steps of {'plain in float32' if name == 'float32' else name}")
        rival = "plain" if name == "float32" else name
        short = {"steps": s.gate_steps, "epochs": 1, "curve": True, "save": True, "dtype": dtype}
        runs[name] = run(s, rival, f"gate-{name}", s.gate, **short)
    trained = {name: str(r.trained) for name, r in runs.items()}
    judge = s.task("judge", s.held_out, options={"trained": trained}, batch=EXACT_ROWS)
    held_out = run_rival(Rival("heldout.py", env=TUNED), judge, limit_s=1800.0).facts["losses"]
    reference = runs.pop("float32").steps
    yield from parity_gates(runs, reference, held_out, s.gate_tokens)


def run(s: Settings, name: str, folder: str, data: Any, **changes: Any) -> Outcome:
    """One process of a rival."""
    rival = RIVALS[name]
    task = s.task(folder, data, options=options_for(rival, s.tuner), **changes)
    return run_one(rival, task, s.model, s.home)


def measure(s: Settings, progress: Progress, deadline: float) -> None:
    """All rounds, one row each; the windows shrink when the time would not suffice."""
    todo = [(k, name) for k in range(1, s.rounds + 1) for name in s.only]
    wall = dict.fromkeys(s.only, STARTUP_S + s.seconds)
    for i, (number, name) in enumerate(todo):
        left, needed = deadline - time.monotonic(), sum(wall[n] for _, n in todo[i:])
        seconds = s.seconds * min(1.0, max(0.1, left / needed))
        say(f"[{i + 1}/{len(todo)}] round {number}: {name} (about {min(left, needed) / 60:.0f} min left)")
        try:
            warm = RIVALS[name].warm
            outcome = run(s, name, f"round-{number}-{name}", s.train, seconds=seconds, warm=warm)
            row = {"rival": name, "round": number, **figures(outcome, warm, s.gate_steps)}
        except RivalFailed as e:
            say(f"  {e}")
            progress.rows.append({"rival": name, "round": number, "error": str(e)})
            continue
        wall[name] = row["wall_s"]
        progress.versions[name] = outcome.facts["versions"]
        progress.rows.append(row)
        forget(s, outcome)
        say(f"  {row['tokens_per_second']:,.0f} tokens/s, {row['peak_bytes'] / 1e9:.2f} GB, {row['wall_s']:.0f} s")
    progress.complete = True


def forget(s: Settings, outcome: Outcome) -> None:
    """Remove a measured job's run folder: checkpoints take space."""
    if "run" in outcome.facts:
        shutil.rmtree(outcome.facts["run"], ignore_errors=True)


def result(s: Settings, progress: Progress, about: dict[str, Any]) -> dict[str, Any]:
    """What goes into the JSON. Ratios are ours over theirs, the median over the rounds."""
    rows = progress.rows
    flops = flops_per_token(model_config(s), s.tuner, 16, s.mean_tokens, s.supervised)
    peak = peak_flops(about["gpu"])
    medians = {name: summary(rows, name) for name in s.only}
    for found in medians.values():
        if found["tokens_per_second"]:
            found["flops"] = found["tokens_per_second"] * flops
            found["mfu"] = found["flops"] / peak if peak else None
    return {
        "ratios": ratios(rows, "tokens_per_second"),
        "memory_ratios": ratios(rows, "peak_bytes"),
        "seconds_to_loss_ratios": ratios(rows, "seconds_to_loss"),
        "complete": progress.complete,
        "settings": {k: str(v) if k in ("folder", "train") else v for k, v in settings_of(s).items()},
        "flops_per_token": flops,
        "medians": medians,
        "gates": [asdict(g) for g in progress.gates] if s.with_gates else "skipped",
        "rows": rows,
        "versions": progress.versions,
        "machine": about,
    }


def settings_of(s: Settings) -> dict[str, Any]:
    names = ("model", "tuner", "batch", "lr", "dtype", "threads", "rounds", "seconds", "min_steps", "gate_steps")
    rest = {"mean_tokens": round(s.mean_tokens, 1), "supervised_share": round(s.supervised, 3)}
    return {name: getattr(s, name) for name in names} | rest | {"token_hash": s.gate_tokens.hash}


def summary(rows: Sequence[dict[str, Any]], name: str) -> dict[str, float | None]:
    wanted = ("tokens_per_second", "supervised_per_second", "peak_bytes", "tree_bytes", "gpu_bytes", "startup_s",
              "compile_s", "median_step_s", "seconds_to_loss")  # fmt: skip
    return {key: median_of(rows, name, key) for key in wanted}


def model_config(s: Settings) -> dict[str, Any]:
    return json.loads((s.folder / "config.json").read_text())


def table(found: dict[str, Any]) -> str:
    """The medians for people."""
    heads = ("tokens/s", "trained/s", "GB", "start s", "compile s", "to loss s", "ours is")
    lines = [" " * 22 + "".join(f"{text:>10}" for text in heads)]
    for name, m in found["medians"].items():
        numbers = (m["tokens_per_second"], m["supervised_per_second"], m["peak_bytes"] and m["peak_bytes"] / 1e9,
                   m["startup_s"], m["compile_s"], m["seconds_to_loss"])  # fmt: skip
        digits = (0, 0, 2, 1, 1, 1)
        cells = "".join(cell(n, d) for n, d in zip(numbers, digits, strict=True))
        ratio = found["ratios"].get(name)
        lines.append(f"{name:22}{cells}{f'{ratio:.2f} x' if ratio else '':>10}")
    if not found["complete"]:
        lines.append("Not complete: not every round was measured.")
    return "\n".join(lines)


def cell(value: float | None, digits: int) -> str:
    return f"{'-' if value is None else f'{value:,.{digits}f}':>10}"


def compare(args: argparse.Namespace) -> int:
    """The whole comparison; returns the exit code: 0, 1 when a gate failed, 130 after Ctrl-C."""
    stop_like_ctrl_c()
    begun = time.monotonic()
    about = machine(args.threads)
    if about["load_1m"] > 0.3:
        say(f"This machine is busy (load {about['load_1m']:.1f}); close other programs, or the figures say little.")
    with prepared(args) as s:
        progress, code = Progress(), 0
        say(f"{args.data.name}: {s.mean_tokens:.0f} tokens a row, {s.supervised:.0%} trained, {s.batch} rows a step, "
            f"{s.dtype}, {s.threads} threads; ids {s.gate_tokens.hash}")  # fmt: skip
        try:
            for gate in run_gates(s) if s.with_gates else ():
                progress.gates.append(gate)
                say(f"  {gate}")
            if all(g.ok for g in progress.gates):
                measure(s, progress, begun + s.budget_s)
            else:
                code = 1
                say("The rivals do not compute the same thing, so nothing was measured. See the lines with FAIL.")
        except RivalFailed as e:
            code = 1
            say(str(e))
        except KeyboardInterrupt:
            code = 130
            say("Stopped. What was measured so far:")
        found = result(s, progress, about)
    save(found, args.json)
    print(table(found), file=sys.stderr if args.json == "-" else sys.stdout)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    return compare(sft_parser(__doc__).parse_args(argv))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
