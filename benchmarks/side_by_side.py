"""What the smaller comparisons share: command line, one process of a rival, gates, rounds, and what they leave."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import figures, median_of, ratios
from benchmarks.gates import Gate
from benchmarks.ours import Place, own_parser
from benchmarks.process import Outcome, RivalFailed, run_ours, run_rival
from benchmarks.rivals.shared import Task
from benchmarks.settings import save, say
from benchmarks.table import Rival

SUMMARY = ("tokens_per_second", "median_step_s", "startup_s", "peak_bytes", "tree_bytes")


@dataclass(frozen=True)
class Sides:
    """What all processes of a comparison have in common. rivals: those that there are. only: those that are measured.

    model: a name of the catalogue or a folder. lr, batch, dtype, seconds, min_steps: as Task has them.
    """

    place: Place
    rivals: Mapping[str, Rival]
    only: tuple[str, ...]
    model: str
    batch: int
    lr: float
    dtype: str
    seconds: float
    min_steps: int

    def run(
        self,
        name: str,
        folder: str,
        data: Path,
        look: Callable[[Path], dict[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Outcome:
        """One process of a rival. options: more than those of the table. look(run folder): facts of our job, which is
        removed afterwards. Raises RivalFailed."""
        from tunewright.models.loader import materialise

        rival = self.rivals[name]
        values: dict[str, Any] = {
            "model": str(materialise(self.model, self.place.home)), "data": str(data),
            "out": str(self.place.work / folder), "batch": self.batch, "lr": self.lr, "dtype": self.dtype,
            "threads": self.place.threads, "seconds": self.seconds, "min_steps": self.min_steps,
            "options": {**rival.options, **(options or {})},
        }  # fmt: skip
        task = Task(**{**values, **changes})
        if rival.program is not None:
            return run_rival(rival, task, limit_s=3600.0)
        outcome = run_ours(task, self.model, self.place.home, limit_s=3600.0)
        run = Path(outcome.facts["run"])
        outcome.facts.update(look(run) if look else {})
        shutil.rmtree(run, ignore_errors=True)
        return outcome


def sides_parser(
    description: str | None, rivals: Mapping[str, Rival], default: Sequence[str], batch: int, unit: str, seconds: float
) -> argparse.ArgumentParser:
    """unit: of which a step has `batch`."""
    p = own_parser(description)
    p.add_argument("--data", type=Path, required=True, help="prompt/completion rows")
    p.add_argument("--only", type=chosen(rivals), default=tuple(default), help=f"rivals, from {', '.join(rivals)}")
    p.add_argument("--batch", type=int, default=batch, help=f"{unit} a step (%(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="each rival is measured so often, in turns (%(default)s)")
    p.add_argument("--seconds", type=float, default=seconds, help="length of a measured window (%(default)s)")
    p.add_argument("--min-steps", type=int, default=20, help="this many steps end a window early (%(default)s)")
    return p


def sides_of(args: argparse.Namespace, place: Place, rivals: Mapping[str, Rival], lr: float) -> Sides:
    """What the command line says."""
    from tunewright.ops.runtime import choose_dtype

    return Sides(
        place=place,
        rivals=rivals,
        only=args.only,
        model=args.model,
        batch=args.batch,
        lr=lr,
        dtype=str(choose_dtype(args.dtype)).removeprefix("torch."),
        seconds=args.seconds,
        min_steps=args.min_steps,
    )


def chosen(rivals: Mapping[str, Rival]) -> Callable[[str], tuple[str, ...]]:
    """The type of --only."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        unknown = [name for name in names if name not in rivals]
        if unknown:
            said = f"there is no rival {', '.join(unknown)}. Use some of: {', '.join(rivals)}"
            raise argparse.ArgumentTypeError(said)
        return names

    return read


def judged(gates: Iterable[Gate], measuring: Callable[[], None]) -> list[Gate]:
    """Look at one gate after another, and measure when all have passed. Ctrl-C ends both; returns the gates seen."""
    seen: list[Gate] = []
    try:
        for gate in gates:
            seen.append(gate)
            say(f"  {gate}")
        if all(g.ok for g in seen):
            measuring()
        else:
            say("The rivals do not compute the same thing, so nothing was measured. See the lines with FAIL.")
    except RivalFailed as e:
        say(str(e))
        seen.append(Gate("every run ends", False, str(e)))
    except KeyboardInterrupt:
        say("Stopped. What was measured so far is kept.")
    return seen


def measure(
    names: Sequence[str],
    rounds: int,
    run: Callable[[str, str], Outcome],
    unit: str,
    batch: int,
    rows: list[dict[str, Any]],
    more: Callable[[Outcome], dict[str, Any]] | None = None,
) -> None:
    """Fill `rows`, one for each rival and round, in turns. run(name, folder): one window of a rival; its steps have
    `batch` units each. more(outcome): what else a row has; it may raise RivalFailed."""
    for number in range(1, rounds + 1):
        for name in names:
            try:
                outcome = run(name, f"round-{number}-{name}")
                row = {**figures(outcome, 1), **(more(outcome) if more else {}), "versions": outcome.facts["versions"]}
            except RivalFailed as e:
                say(f"  {e}")
                rows.append({"rival": name, "round": number, "error": str(e)})
                continue
            rate = row["window_steps"] * batch / row["window_s"]
            rows.append({"rival": name, "round": number, f"{unit}_per_second": rate, **row})
            say(
                f"  round {number}: {name} {rate:,.2f} {unit}/s, {row['tokens_per_second']:,.0f} tokens/s, "
                f"{row['median_step_s']:.1f} s a step, {row['peak_bytes'] / 1e9:.2f} GB, {row['wall_s']:.0f} s in all"
            )


def conclude(
    rows: list[dict[str, Any]],
    gates: Sequence[Gate],
    about: dict[str, Any],
    where: str | None,
    rate: str = "tokens_per_second",
) -> int:
    """Write the result, say how many times as fast we are (in `rate`), and return the exit code: 1 when a gate failed
    or a rival did."""
    names = dict.fromkeys(row["rival"] for row in rows)
    found = {
        "ratios": ratios(rows, rate),
        "memory_ratios": ratios(rows, "peak_bytes"),
        "medians": {name: {key: median_of(rows, name, key) for key in (rate, *SUMMARY)} for name in names},
        "gates": [asdict(g) for g in gates],
        "versions": {row["rival"]: row["versions"] for row in rows if "versions" in row},
        "rows": [{k: v for k, v in row.items() if k != "versions"} for row in rows],
    }
    save({**found, **about}, where)
    for name, ratio in found["ratios"].items():
        say(f"ours is {ratio:.2f} times as fast as {name}")
    return 0 if all(g.ok for g in gates) and not any("error" in row for row in rows) else 1
