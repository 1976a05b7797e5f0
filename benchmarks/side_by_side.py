"""What the smaller comparisons share: their rounds, and what they leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.figures import figures, ratios
from benchmarks.gates import Gate
from benchmarks.process import Outcome, RivalFailed
from benchmarks.settings import save, say


def measure(
    names: Sequence[str],
    rounds: int,
    run: Callable[[str, str], Outcome],
    unit: str,
    batch: int,
    rows: list[dict[str, Any]],
) -> None:
    """Fill `rows`, one for each rival and round, in turns. run(name, folder): one window of a rival; its steps have
    `batch` units each."""
    for number in range(1, rounds + 1):
        for name in names:
            try:
                row = figures(run(name, f"round-{number}-{name}"), 1)
            except RivalFailed as e:
                say(f"  {e}")
                rows.append({"rival": name, "round": number, "error": str(e)})
                continue
            rate = row["window_steps"] * batch / row["window_s"]
            rows.append({"rival": name, "round": number, f"{unit}_per_second": rate, **row})
            say(f"  round {number}: {name} {row['tokens_per_second']:,.0f} tokens/s, {row['peak_bytes'] / 1e9:.2f} GB")


def conclude(rows: list[dict[str, Any]], gates: Sequence[Gate], about: dict[str, Any], where: str | None) -> int:
    """Write the result, say how many times as fast we are, and return the exit code: 1 when a gate failed."""
    found = ratios(rows, "tokens_per_second")
    memory = ratios(rows, "peak_bytes")
    save({"ratios": found, "memory_ratios": memory, "gates": [asdict(g) for g in gates], "rows": rows, **about}, where)
    for name, ratio in found.items():
        say(f"ours is {ratio:.2f} times as fast as {name}")
    return 0 if all(g.ok for g in gates) else 1
