"""RLAIF from the project's parts: two sampled answers to a prompt, a judge asked in both orders, DPO on what it says.

    python recipes/rlaif.py smollm2-135m-instruct prompts.jsonl --out adapter
    python recipes/rlaif.py smollm2-135m-instruct prompts.jsonl --judge http://127.0.0.1:11434/v1 --judge-model large

The judge's server is listed in TUNEWRIGHT_ENDPOINTS. Without --judge a rule takes its place: the shorter answer is
better. Read it from top to bottom; the DPO steps are those of dpo.py. `tunewright train` with `objective: rlaif` does
more (exact resume, plan, validation, the fast path).
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

import torch
from dpo import read_pairs, step

from tunewright.core.asking import Teacher
from tunewright.core.events import EventWriter
from tunewright.core.home import find_home
from tunewright.core.outbound import Endpoint, Reply, find_endpoint
from tunewright.data.asking import prompt_of
from tunewright.data.judging import Judged, judged_rows
from tunewright.data.validate import check_file, raise_for, read_conversations
from tunewright.engine.engine import Engine
from tunewright.models.loader import load_model, materialise
from tunewright.models.policy import Policy
from tunewright.objectives.dpo import DPO
from tunewright.train.candidates import sampled_pairs
from tunewright.train.optim.adamw import AdamW
from tunewright.train.reference import Reference
from tunewright.tuners.lora import LoRA


def shorter_is_better(endpoint: Endpoint, path: str, body: Any, timeout: float) -> Reply:
    """In the place of an HTTP request to a judge: its answer, `1` or `2`, by a rule."""
    first, second = re.findall(r"<answer \d>\n(.*?)\n</answer \d>", body["messages"][-1]["content"], re.DOTALL)
    choice = "1" if len(first) < len(second) else "2" if len(second) < len(first) else "neither"
    return Reply(200, {"choices": [{"message": {"content": choice}}]})


def label(args: argparse.Namespace, pairs_file: Path) -> Judged:
    """Write the judged pairs as preference rows; a pair that the judge sees differently in each order is left out."""
    home = find_home().ensure()
    report = check_file(args.data, purpose_shapes=("prompt", "chat"), min_examples=1)
    raise_for(report, what="training")
    prompts = (prompt_of(row) for row in read_conversations(args.data, report.format))
    asked = {"base": args.model, "temperature": 1.0, "max_tokens": args.tokens}
    events = EventWriter(args.out / "events.jsonl", 1)
    pairs = sampled_pairs(
        args.out / "sampled.jsonl", prompts, report.n_rows, lambda: Engine(home), asked, 0, events, lambda: False
    )
    judge = Teacher(Endpoint("http", "rule", 80, ""), "rule", args.out / "verdicts", post=shorter_is_better)
    if args.judge:
        judge = Teacher(
            find_endpoint(args.judge), args.judge_model, home.cache / "answers", options={"max_tokens": 512}
        )
    judged = Judged()
    rows = judged_rows(pairs, judge, judged, args.principles, budget=10**6, concurrency=4, stop=lambda: False)
    pairs_file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return judged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a catalogue name or a model folder")
    parser.add_argument("data", type=Path, help="prompts, or chat rows whose last answer is left off")
    parser.add_argument("--out", type=Path, default=Path("adapter"))
    parser.add_argument("--judge", help="base URL of an OpenAI-compatible server, listed in TUNEWRIGHT_ENDPOINTS")
    parser.add_argument("--judge-model", default="judge")
    parser.add_argument("--principles", default="")
    parser.add_argument("--tokens", type=int, default=128, help="of a sampled answer")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1e-4)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    judged = label(args, args.out / "pairs.jsonl")
    print(
        f"{judged.answered} of {judged.rows} pairs judged; ties: {judged.ties or 'none'}; equal: {judged.same}",
        flush=True,
    )
    folder = materialise(args.model, find_home().ensure())
    groups = read_pairs(args.out / "pairs.jsonl", folder)
    tuner = LoRA(LoRA.Options(r=16, alpha=32))
    policy = Policy(tuner.attach(load_model(folder), seed=0))
    objective = DPO(DPO.Options())
    objective.reference = Reference(policy, tuner.off)  # the model at step 0: a fresh adapter, switched off
    optimizer = AdamW.build(tuner.trainable(), args.rate, AdamW.Options())
    for epoch in range(args.epochs):
        order = random.Random(epoch).sample(range(len(groups)), len(groups))
        for k in range(0, len(order), 8):
            optimizer.zero_grad()
            loss, margin = step(policy, objective, [groups[i] for i in order[k : k + 8]])
            torch.nn.utils.clip_grad_norm_(list(tuner.trainable().values()), 1.0)
            optimizer.step()
            print(f"epoch {epoch + 1}: loss {loss:.4f}, margin {margin:.4f}", flush=True)
    tuner.save(args.out, str(folder))
    print(f"the adapter is in {args.out}; peft.PeftModel.from_pretrained opens it")


if __name__ == "__main__":
    main()
