"""Classifying rows with an encoder, side by side with transformers' Trainer.

    python -m benchmarks.encoder --json encoder.json

All weights of MiniLM and a fresh head learn to sort customer remarks into topics. Everybody starts from one folder that
has the head already, with dropout switched off, so that the first steps can be compared: loss in float32 to 1e-5,
gradient norm to 2 %, tokens of each step equal. `trainer` is the Trainer as it comes (float32), `trainer_best` has
bfloat16 autocast and an allocator that keeps its memory.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import machine
from benchmarks.gates import GRADIENT, Gate
from benchmarks.make_data import TOPICS, capital, fill
from benchmarks.ours import Place, own_parser, placed
from benchmarks.process import Outcome, run_ours, run_rival
from benchmarks.rivals.shared import Task
from benchmarks.settings import say, stop_like_ctrl_c, write
from benchmarks.side_by_side import conclude, measure
from benchmarks.table import TUNED, Rival

MODEL = "all-minilm-l6-v2"
ROWS, BATCH, GATE_STEPS = 2048, 32, 4
EXACT, CURVE = 1e-5, 0.01
RIVALS = {
    "ours": Rival(None, options={"objective": "classify"}),
    "trainer": Rival("classify.py"),
    "trainer_best": Rival("classify.py", env=TUNED, options={"bf16": True}),
}


@dataclass(frozen=True)
class Setup:
    """folder: the model with its head. train, gate: rows; the gate's are few."""

    place: Place
    folder: Path
    train: Path
    gate: Path
    seconds: float
    min_steps: int

    def task(self, name: str, data: Path, **changes: Any) -> Task:
        options: dict[str, Any] = {
            "model": str(self.folder), "data": str(data), "out": str(self.place.work / name), "tuner": "full",
            "batch": BATCH, "lr": 2e-5, "dtype": self.place.dtype, "threads": self.place.threads,
            "seconds": self.seconds, "min_steps": self.min_steps,
        }  # fmt: skip
        return Task(**{**options, **changes})

    def run(self, name: str, task: Task) -> Outcome:
        rival = RIVALS[name]
        changed = Task(**{**task.__dict__, "options": {**rival.options, **task.options}})
        if rival.program is None:
            outcome = run_ours(changed, str(self.folder), self.place.home, limit_s=1800.0)
            shutil.rmtree(outcome.facts["run"], ignore_errors=True)
            return outcome
        return run_rival(rival, changed, limit_s=1800.0)

    def window(self, name: str, folder: str) -> Outcome:
        return self.run(name, self.task(folder, self.train))


def remarks(n: int) -> list[str]:
    """n rows {"text", "label"}: one to six remarks of one topic."""
    rows = []
    for i in range(n):
        rng = random.Random(f"encoder/{i}")
        topic = sorted(TOPICS)[i % len(TOPICS)]
        said = [capital(fill(rng, rng.choice(TOPICS[topic]))) for _ in range(rng.randint(1, 6))]
        rows.append(json.dumps({"text": ". ".join(said) + ".", "label": topic}))
    return rows


def with_head(source: Path, folder: Path) -> Path:
    """The encoder with a fresh head (from a fixed seed) and without dropout."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    names = sorted(TOPICS)
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(
        source,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        dtype=torch.float32,
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def gates(s: Setup) -> list[Gate]:
    """A few float32 steps of ours and the Trainer."""
    runs = {}
    for name in ("ours", "trainer"):
        say(f"gates: {GATE_STEPS} steps of {name}")
        task = s.task(f"gate-{name}", s.gate, steps=GATE_STEPS, epochs=1, dtype="float32", curve=True)
        runs[name] = s.run(name, task).steps
    ours, theirs = runs["ours"], runs["trainer"]
    counts = [[step.tokens for step in steps] for steps in (ours, theirs)]
    off = [abs((a.loss or 0.0) - (b.loss or 1e9)) for a, b in zip(ours, theirs, strict=False)]
    norms = (ours[0].grad_norm or 0.0, theirs[0].grad_norm or 1e9)
    turned = abs(norms[0] / norms[1] - 1)
    return [
        Gate("tokens of each step", counts[0] == counts[1], f"ours {counts[0]}, Trainer {counts[1]}"),
        Gate("float32 loss of step 1", off[0] <= EXACT, f"off by {off[0]:.1e}"),
        Gate("gradient norm of step 1", norms[0] > 0 and turned <= GRADIENT, f"off by {turned:.2%}"),
        Gate("losses", max(off) <= CURVE, f"worst off by {max(off):.1e}"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    p = own_parser(__doc__)
    p.set_defaults(model=MODEL)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seconds", type=float, default=60.0, help="length of a measured window (%(default)s)")
    p.add_argument("--min-steps", type=int, default=20, help="this many steps end a window early (%(default)s)")
    args = p.parse_args(argv)
    stop_like_ctrl_c()
    begun = time.monotonic()
    with placed(args) as place:
        about = machine(place.threads)
        text = remarks(ROWS)
        setup = Setup(
            place=place,
            folder=with_head(place.home.models / args.model, place.work / "encoder"),
            train=write(place.work / "remarks.jsonl", text),
            gate=write(place.work / "gate.jsonl", text[: GATE_STEPS * BATCH]),
            seconds=args.seconds,
            min_steps=args.min_steps,
        )
        passed, rows = gates(setup), list[dict[str, Any]]()
        for gate in passed:
            say(f"  {gate}")
        if all(g.ok for g in passed):
            try:
                measure(tuple(RIVALS), args.rounds, setup.window, "rows", BATCH, rows)
            except KeyboardInterrupt:
                say("Stopped. What was measured so far is kept.")
    return conclude(
        rows, passed, {"model": args.model, "machine": about, "seconds": time.monotonic() - begun}, args.json
    )


if __name__ == "__main__":
    sys.exit(main())
