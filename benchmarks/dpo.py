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
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import machine
from benchmarks.gates import GRADIENT, Gate
from benchmarks.ours import Place, own_parser, placed
from benchmarks.process import Outcome, run_ours, run_rival
from benchmarks.rivals.shared import Task
from benchmarks.settings import say, stop_like_ctrl_c, write
from benchmarks.side_by_side import conclude, measure
from benchmarks.table import FUSED, TUNED, Rival

BATCH, GATE_STEPS, RATE = 8, 6, 1e-4
# float32: what sums in another order leave after a few steps; half: what bfloat16 leaves of a margin of a few nats
EXACT, CURVE = 1e-4, 0.02
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
    """train: the pairs; gate: the few of the gates' short runs. only: the rivals' names."""

    place: Place
    only: tuple[str, ...]
    train: Path
    gate: Path
    batch: int
    dtype: str
    seconds: float
    min_steps: int

    def run(self, name: str, folder: str, data: Path, **changes: Any) -> Outcome:
        rival = RIVALS[name]
        values: dict[str, Any] = {
            "model": str(self.place.home.models / self.place.model), "data": str(data),
            "out": str(self.place.work / folder), "batch": self.batch, "lr": RATE, "dtype": self.dtype,
            "threads": self.place.threads, "seconds": self.seconds, "min_steps": self.min_steps,
            "options": rival.options,
        }  # fmt: skip
        task = Task(**{**values, **changes})
        if rival.program is not None:
            return run_rival(rival, task, limit_s=3600.0)
        outcome = run_ours(task, self.place.model, self.place.home, limit_s=3600.0)
        shutil.rmtree(outcome.facts["run"], ignore_errors=True)
        return outcome


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
    short: dict[str, Any] = {"steps": GATE_STEPS, "epochs": 1, "curve": True}
    exact = {name: s.run(name, f"exact-{name}", s.gate, dtype="float32", **short).steps for name in ("ours", "plain")}
    losses = [abs((a.loss or 0) - (b.loss or 9)) for a, b in zip(exact["ours"], exact["plain"], strict=True)]
    norms = [abs((a.grad_norm or 0) / (b.grad_norm or 9) - 1) for a, b in zip(*exact.values(), strict=True)]
    detail = f"losses off by up to {max(losses):.1e}, gradient norms by {max(norms):.1e}"
    yield Gate("float32", max(losses) <= EXACT and max(norms) <= 1e-3, detail)
    say(f"gates: {GATE_STEPS} steps of plain")
    plain = s.run("plain", "gate-plain", s.gate, **short)
    for name in (n for n in s.only if n != "plain"):
        say(f"gates: {GATE_STEPS} steps of {name}")
        yield from against(name, s.run(name, f"gate-{name}", s.gate, **short), plain)


def against(name: str, run: Outcome, plain: Outcome) -> Iterator[Gate]:
    """Tokens, first gradient norm and losses of a rival beside the plain loop's."""
    if "token_hash" in run.facts:
        same = run.facts["token_hash"] == plain.facts["token_hash"]
        yield Gate(f"{name}: token ids and masks", same, run.facts["token_hash"])
    counts = [[(x.tokens, x.supervised) for x in r.steps] for r in (run, plain)]
    yield Gate(f"{name}: tokens of each step", counts[0] == counts[1], f"{counts[0]}, plain {counts[1]}")
    mine, theirs = ((r.steps[0].grad_norm or 0.0) for r in (run, plain))
    off = abs(mine / (theirs or 1e-9) - 1)
    yield Gate(f"{name}: gradient norm of step 1", mine > 0 and off <= GRADIENT, f"{mine:.4f}, plain {theirs:.4f}")
    far = [abs((a.loss or 0) - (b.loss or 9)) for a, b in zip(run.steps, plain.steps, strict=True)]
    yield Gate(
        f"{name}: losses", max(far) <= CURVE, f"median off by {statistics.median(far):.1e}, worst {max(far):.1e}"
    )


def setup(args: argparse.Namespace, place: Place) -> Setup:
    from tunewright.ops.runtime import choose_dtype

    pairs = make_pairs(args.data)
    if len(pairs) < GATE_STEPS * args.batch:
        sys.exit(f"--data: {args.data} makes {len(pairs)} pairs; {GATE_STEPS * args.batch} are needed")
    return Setup(
        place=place,
        only=tuple(args.only.split(",")),
        train=write(place.work / "pairs.jsonl", pairs),
        gate=write(place.work / "gate.jsonl", pairs[: GATE_STEPS * args.batch]),
        batch=args.batch,
        dtype=str(choose_dtype(args.dtype)).removeprefix("torch."),
        seconds=args.seconds,
        min_steps=args.min_steps,
    )


def main(argv: Sequence[str] | None = None) -> int:
    p = own_parser(__doc__)
    p.add_argument("--data", type=Path, required=True, help="prompt/completion rows, of which the pairs are made")
    p.add_argument("--only", default=",".join(DEFAULT), help=f"rivals, from {', '.join(RIVALS)}")
    p.add_argument("--batch", type=int, default=BATCH, help="pairs a step (%(default)s)")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seconds", type=float, default=120.0, help="length of a measured window (%(default)s)")
    p.add_argument("--min-steps", type=int, default=20, help="this many steps end a window early (%(default)s)")
    args = p.parse_args(argv)
    unknown = [name for name in args.only.split(",") if name not in RIVALS]
    if unknown:
        p.error(f"--only: there is no rival {', '.join(unknown)}. Use some of: {', '.join(RIVALS)}")
    stop_like_ctrl_c()
    begun = time.monotonic()
    with placed(args) as place:
        about, passed, rows = machine(place.threads), [], []
        s = setup(args, place)
        try:
            for gate in gates(s):
                passed.append(gate)
                say(f"  {gate}")
            if all(g.ok for g in passed):
                measure(s.only, args.rounds, lambda name, at: s.run(name, at, s.train), "pairs", s.batch, rows)
        except KeyboardInterrupt:
            say("Stopped. What was measured so far is kept.")
    settings = {"model": args.model, "data": args.data.name, "batch": args.batch, "lr": RATE, "dtype": s.dtype}
    return conclude(
        rows, passed, {"settings": settings, "machine": about, "seconds": time.monotonic() - begun}, args.json
    )


if __name__ == "__main__":
    sys.exit(main())
