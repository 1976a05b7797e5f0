"""The speed of every tuner: ours against our LoRA, and against peft's own where peft has the method.

    python -m benchmarks.tuners --json tuners.json

Ours is a job of the real worker; peft's is the plain loop of transformers + peft (rivals/plain.py) with the
configuration that our tuner gives peft, on the same rows, in the same dtype and batches. Each run is a process of its
own, in turns: LoRA, then ours and peft's of a few tuners, LoRA again, and so on; a tuner is compared with the LoRA just
before it, and with peft's run just after it. Only the speed: that the numbers are peft's is for the tests to show.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import figures, machine
from benchmarks.methods import NEEDED
from benchmarks.ours import Place, own_parser, placed
from benchmarks.process import Outcome, RivalFailed, run_rival
from benchmarks.rivals.shared import Task
from benchmarks.settings import RATES, save, say, stop_like_ctrl_c
from benchmarks.table import RIVALS
from tunewright.models.catalogue import resolve
from tunewright.tuners import TUNERS

LORA = "lora"
# methods that peft has; DyLoRA's modules are peft's LoRA, its steps are not
IN_PEFT = (LORA, "rslora", "dora", "adalora", "vera", "oft", "ia3", "prompt", "p_tuning", "prefix")
# shares of our LoRA's tokens/s that a tuner is to reach; the others: peft's own speed
TARGETS = {"rslora": 0.8, "dylora": 0.8, "adalora": 0.7, "dora": 0.6}
# options of ours for the measured steps: these do all that most steps of a job do, at LoRA's rank (rsLoRA's own is 64)
OPTIONS: dict[str, dict[str, Any]] = {**NEEDED, "adalora": {"warmup": 0.0}, "rslora": {"r": 16}}
BETWEEN = 3  # tuners from one run of LoRA to the next
DATA = Path(__file__).parent / "data" / "short.jsonl"
OURS, PEFT = "ours", "peft"
KEPT = ("tokens_per_second", "median_step_s", "window_steps", "startup_s", "wall_s", "peak_bytes")


@dataclass(frozen=True)
class Bench:
    """place: where jobs run. folder: the model's files. rival: of table.py, how peft's loop runs. window: of a Task."""

    place: Place
    folder: Path
    data: Path
    batch: int
    rival: str
    window: dict[str, Any]

    def run(self, side: str, tuner: str, number: int) -> Outcome:
        """One process. Raises RivalFailed."""
        name = f"{number}-{side}-{tuner}"
        if side == OURS:
            options = {"tuner": {"name": tuner, **OPTIONS.get(tuner, {})}}
            return self.place.run(name, self.data, batch=self.batch, options=options, **self.window)
        task = Task(model=str(self.folder), data=str(self.data), out=str(self.place.work / name), tuner=tuner,
                    lr=RATES[LORA], batch=self.batch, dtype=dtype_name(self.place), threads=self.place.threads,
                    options={"peft": str(self.place.work / "peft" / tuner)}, **self.window)  # fmt: skip
        return run_rival(RIVALS[self.rival], task, limit_s=3600.0)


def dtype_name(place: Place) -> str:
    from tunewright.ops.runtime import choose_dtype

    return str(choose_dtype(place.dtype)).removeprefix("torch.")


def write_configs(bench: Bench, tuners: Sequence[str]) -> None:
    """What each of our tuners tells peft, as peft's own file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tunewright.models.layouts import use_attention
    from tunewright.ops import attention

    with torch.device("meta"):  # its shapes are enough
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(bench.folder))
    use_attention(model, attention.NAME)
    for name in tuners:
        part = TUNERS.load(name)
        config = part(part.Options(**OPTIONS.get(name, {}))).config(model, 1)
        config.save_pretrained(str(bench.place.work / "peft" / name))


def turns(tuners: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(side, tuner) of a round. LoRA stands before each few of the others."""
    others = [name for name in tuners if name != LORA]
    for i in range(0, max(len(others), 1), BETWEEN):
        yield OURS, LORA
        if i == 0 and LORA in tuners:
            yield PEFT, LORA
        for name in others[i : i + BETWEEN]:
            yield OURS, name
            if name in IN_PEFT:
                yield PEFT, name


def measure(bench: Bench, tuners: Sequence[str], rounds: int, deadline: float, rows: list[dict[str, Any]]) -> bool:
    """Fill `rows`, one a run. A further round is begun only if it would be over in time; returns whether all were."""
    order, wall = list(turns(tuners)), 0.0
    for number in range(1, rounds + 1):
        if time.monotonic() + wall > deadline:
            say(f"No time for round {number} of {rounds}.")
            return False
        begun = time.monotonic()
        for i, (side, name) in enumerate(order):
            say(f"[{i + 1}/{len(order)}] round {number}: {side} {name}")
            rows.append({"tuner": name, "side": side, "round": number, **measured(bench, side, name, number)})
        wall = time.monotonic() - begun
    return True


def measured(bench: Bench, side: str, name: str, number: int) -> dict[str, Any]:
    """The figures of a run, or its error."""
    try:
        outcome = bench.run(side, name, number)
        found = figures(outcome, 1)
    except RivalFailed as e:
        say(f"  {e}")
        return {"error": str(e)}
    finally:
        for left in bench.place.work.glob(f"{number}-*"):
            shutil.rmtree(left)
    plan = outcome.facts.get("plan", {})
    path = f", {plan['path']} path" if plan else ""
    say(f"  {found['tokens_per_second']:,.0f} tokens/s, {found['wall_s']:.0f} s{path}")
    return {key: found[key] for key in KEPT} | {key: plan[key] for key in ("path",) if plan}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{tuner: its tokens/s, how many times LoRA's and peft's that is (medians over the rounds), its target, whether it
    is reached}."""
    found: dict[str, dict[str, list[float]]] = {}
    lora = 0.0
    mine: dict[tuple[str, int], float] = {}
    for row in rows:
        rate, name, at = row.get("tokens_per_second"), row["tuner"], (row["tuner"], row["round"])
        if row["side"] == OURS and name == LORA:
            lora = rate or 0.0
        if not rate:
            continue
        figure = found.setdefault(name, {"tokens_per_second": [], "of_lora": [], "of_peft": []})
        if row["side"] == OURS:
            mine[at] = rate
            figure["tokens_per_second"].append(rate)
            figure["of_lora"] += [rate / lora] if lora else []
        elif at in mine:
            figure["of_peft"].append(mine[at] / rate)
    return {name: judged(name, figure) for name, figure in found.items()}


def judged(name: str, figure: dict[str, list[float]]) -> dict[str, Any]:
    medians = {key: statistics.median(values) if values else None for key, values in figure.items()}
    share, times = medians["of_lora"], medians["of_peft"]
    target = TARGETS.get(name)
    reached = share and share >= target if target else times and times >= 1 if name in IN_PEFT else None
    return {**medians, "target_of_lora": target, "reached": reached if reached is None else bool(reached)}


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'':14}{'tokens/s':>10}{'of LoRA':>9}{'of peft':>9}"]
    for name, figure in found.items():
        cells = [f"{figure['tokens_per_second'] or 0:>10,.0f}"]
        cells += [f"{'-' if figure[key] is None else f'{figure[key]:.2f}':>9}" for key in ("of_lora", "of_peft")]
        missed = "" if figure["reached"] in (True, None) else "  below what it is to reach"
        lines.append(f"{name:14}{''.join(cells)}{missed}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    p = own_parser(__doc__)
    p.add_argument("--data", type=Path, default=DATA, help="prompt/completion rows (%(default)s)")
    p.add_argument("--only", default="", help=f"some tuners, from {', '.join(TUNERS)}")
    p.add_argument("--rounds", type=int, default=2, help="each run is made so often, in turns (%(default)s)")
    p.add_argument("--seconds", type=float, default=8.0, help="length of a measured window (%(default)s)")
    p.add_argument("--min-steps", type=int, default=20, help="this many steps end a window early (%(default)s)")
    p.add_argument("--minutes", type=float, default=30.0, help="no round is begun that would end later (%(default)s)")
    p.add_argument("--batch", type=int, default=8, help="rows a step (%(default)s)")
    p.add_argument("--rival", choices=("plain", "plain_tuned"), default="plain",
                   help="peft's loop: as documented, or with glibc told to keep its memory (%(default)s)")  # fmt: skip
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    tuners = args.only.split(",") if args.only else list(TUNERS)
    for name in tuners:
        TUNERS.load(name)  # an unknown name is refused here, with the nearest one
    stop_like_ctrl_c()
    begun, rows, complete, code = time.monotonic(), list[dict[str, Any]](), False, 0
    with placed(args) as place:
        folder = resolve(args.model, place.home).folder
        assert folder is not None
        window = {"seconds": args.seconds, "min_steps": args.min_steps}
        bench = Bench(place, folder, args.data, args.batch, args.rival, window)
        about = machine(place.threads)
        try:
            write_configs(bench, [name for name in {LORA, *tuners} if name in IN_PEFT])
            complete = measure(bench, tuners, args.rounds, begun + args.minutes * 60, rows)
        except KeyboardInterrupt:
            code = 130
            say("Stopped. What was measured so far:")
    found = summary(rows)
    settings = {"model": args.model, "data": args.data.name, "batch": args.batch, "dtype": dtype_name(place),
                "rival": args.rival, "options": OPTIONS, **window}  # fmt: skip
    save({"complete": complete, "settings": settings, "tuners": found, "rows": rows, "machine": about}, args.json)
    print(table(found), file=sys.stderr if args.json == "-" else sys.stdout)
    return code


if __name__ == "__main__":
    sys.exit(main())
