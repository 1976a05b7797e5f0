"""DPO with LoRA side by side: tunewright, TRL's DPOTrainer as it comes and at its best, a plain loop.

    python -m benchmarks.dpo --data benchmarks/data/mixed.jsonl --json dpo.json

The pairs are made of prompt/completion rows: the rejected answer is another row's. Everybody takes the same pairs in
the same order and batches, with the same loss mask, learning rate, beta and threads, in a process of its own, in turns.
First the gates: float32 losses and gradient norms of ours and the plain loop, then tokens of each step, losses and
gradient norms of everybody in the dtype that is measured. Tokens count both answers with their prompts, without
padding, also where we compute a prompt once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import machine
from benchmarks.gates import GRADIENT, Gate, curve_gate
from benchmarks.ours import Place, placed
from benchmarks.process import Outcome, Step
from benchmarks.settings import say, stop_like_ctrl_c, write
from benchmarks.side_by_side import Sides, conclude, judged, measure, sides_of, sides_parser
from benchmarks.table import FUSED, TUNED, Rival

BATCH, RATE = 8, 1e-4
GATE_STEPS, GATE_BATCH = 3, 4
EXACT = 1e-4  # float32: what sums in another order leave of a loss after a few steps
RIVALS = {
    "ours": Rival(None, options={"objective": "dpo"}),
    "trl_default": Rival("trl_dpo.py", trl=True),
    "trl_best": Rival("trl_dpo.py", trl=True, env=TUNED, options=FUSED),
    "plain": Rival("plain_dpo.py", env=TUNED),
    # the reference before step 1, outside the measured window: its steps have one pass less than everybody's
    "trl_precomputed": Rival("trl_dpo.py", trl=True, env=TUNED, options={**FUSED, "precompute_ref_log_probs": True}),
}
DEFAULT = ("ours", "trl_default", "trl_best", "plain")


@dataclass(frozen=True)
class Setup:
    """train: the pairs; gate: the few of the gates' short runs."""

    sides: Sides
    train: Path
    gate: Path


def make_pairs(data: Path) -> list[str]:
    """Rows {"prompt", "chosen", "rejected"}: each row's completion against the next row's that differs."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    found = []
    for i, row in enumerate(rows):
        others = (rows[(i + k) % len(rows)]["completion"] for k in range(1, len(rows)))
        other = next((c for c in others if c != row["completion"]), None)
        if other is not None:
            pair = {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other}
            found.append(json.dumps(pair, ensure_ascii=False))
    return found


def gates(s: Setup) -> Iterator[Gate]:
    """The float32 steps of ours and plain; then everybody against plain in the dtype that is measured."""
    short: dict[str, Any] = {"steps": GATE_STEPS, "batch": GATE_BATCH, "epochs": 1, "curve": True}
    run = s.sides.run
    exact = {name: run(name, f"exact-{name}", s.gate, dtype="float32", **short).steps for name in ("ours", "plain")}
    losses = [abs((a.loss or 0) - (b.loss or 9)) for a, b in zip(exact["ours"], exact["plain"], strict=True)]
    norms = [abs((a.grad_norm or 0) / (b.grad_norm or 9) - 1) for a, b in zip(*exact.values(), strict=True)]
    detail = f"losses off by up to {max(losses):.1e}, gradient norms by {max(norms):.1e}"
    yield Gate("float32", max(losses) <= EXACT and max(norms) <= 1e-3, detail)
    say(f"gates: {GATE_STEPS} steps of plain")
    plain = run("plain", "gate-plain", s.gate, **short)
    for name in (n for n in s.sides.only if n != "plain"):
        say(f"gates: {GATE_STEPS} steps of {name}")
        yield from against(name, run(name, f"gate-{name}", s.gate, **short), plain, exact["plain"])


def against(name: str, run: Outcome, plain: Outcome, exact: list[Step]) -> Iterator[Gate]:
    """Tokens, first gradient norm and losses of a rival beside the plain loop's. exact: its float32 steps."""
    if "token_hash" in run.facts:
        same = run.facts["token_hash"] == plain.facts["token_hash"]
        yield Gate(f"{name}: token ids and masks", same, run.facts["token_hash"])
    counts = [[(x.tokens, x.supervised) for x in r.steps] for r in (run, plain)]
    yield Gate(f"{name}: tokens of each step", counts[0] == counts[1], f"{counts[0]}, plain {counts[1]}")
    mine, theirs = ((r.steps[0].grad_norm or 0.0) for r in (run, plain))
    off = abs(mine / (theirs or 1e-9) - 1)
    yield Gate(f"{name}: gradient norm of step 1", mine > 0 and off <= GRADIENT, f"{mine:.4f}, plain {theirs:.4f}")
    yield curve_gate(name, run.steps, (exact, plain.steps))


def setup(args: argparse.Namespace, place: Place) -> Setup:
    pairs = make_pairs(args.data)
    needed = max(GATE_STEPS * GATE_BATCH, args.batch)
    if len(pairs) < needed:
        sys.exit(f"--data: {args.data} makes {len(pairs)} pairs; {needed} are needed")
    return Setup(
        sides_of(args, place, RIVALS, RATE),
        train=write(place.work / "pairs.jsonl", pairs),
        gate=write(place.work / "gate.jsonl", pairs[: GATE_STEPS * GATE_BATCH]),
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = sides_parser(__doc__, RIVALS, DEFAULT, BATCH, "pairs", seconds=30.0).parse_args(argv)
    stop_like_ctrl_c()
    begun = time.monotonic()
    with placed(args) as place:
        about, rows = machine(place.threads), list[dict[str, Any]]()
        s = setup(args, place)
        sides = s.sides

        def all_rounds() -> None:
            measure(sides.only, args.rounds, lambda name, at: sides.run(name, at, s.train), "pairs", args.batch, rows)

        passed = judged(gates(s), all_rounds)
    settings = {"model": args.model, "data": args.data.name, "batch": args.batch, "lr": RATE, "dtype": sides.dtype}
    return conclude(
        rows, passed, {"settings": settings, "machine": about, "seconds": time.monotonic() - begun}, args.json
    )


if __name__ == "__main__":
    sys.exit(main())
