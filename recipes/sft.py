"""SFT from the project's parts: rows as tokens with a loss weight each, a fresh LoRA, one step after another.

    python recipes/sft.py smollm2-135m-instruct train.jsonl --out adapter

Read it from top to bottom. `tunewright train` does more (exact resume, plan, validation, the fast path); this shows
what a step is. distill.py takes the same steps with another objective.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from tunewright.core.example import Group
from tunewright.core.home import find_home
from tunewright.data.render import render_rows
from tunewright.data.tokenizer import Tokenizer
from tunewright.data.validate import check_file, raise_for, read_conversations
from tunewright.models.loader import load_model, materialise
from tunewright.models.policy import Policy
from tunewright.objectives.base import Objective
from tunewright.objectives.sft import SFT
from tunewright.ops.packing import pack
from tunewright.train.optim.adamw import AdamW
from tunewright.tuners.lora import LoRA


def read_rows(data: Path, folder: Path) -> list[Group]:
    """The rows as tokens, of which the answers have weight 1. Raises DataError with every bad row."""
    report = check_file(data, purpose_shapes=("chat",), min_examples=1)
    raise_for(report, what="training")
    rows = read_conversations(data, report.format)
    return list(render_rows(rows, Tokenizer.load(folder), max_length=1024))


def step(policy: Policy, objective: Objective, rows: Sequence[Group]) -> dict[str, float]:
    """Leave the gradients of the mean loss over `rows` on the parameters; returns each term's mean over their answers'
    tokens. Rows lie one after another without padding, and only the whole step is divided by its weight."""
    batches = pack(list(rows), micro_batch_tokens=2048)
    weight = sum(objective.weights(batch)["loss"] for batch in batches)
    means: dict[str, float] = {}
    for batch in batches:
        terms = objective(policy, batch.to(policy.device))
        (terms["loss"].total / weight).backward()
        for name, term in terms.items():
            means[name] = means.get(name, 0.0) + term.total.item() / weight
    return means


def train(policy: Policy, objective: Objective, tuner: LoRA, groups: list[Group], args: argparse.Namespace) -> None:
    """All steps, each printed; then the adapter is written."""
    optimizer = AdamW.build(tuner.trainable(), args.rate, AdamW.Options())
    number = 0
    for epoch in range(args.epochs):
        order = random.Random(epoch).sample(range(len(groups)), len(groups))
        for k in range(0, len(order), args.rows):
            number += 1
            optimizer.zero_grad()
            means = step(policy, objective, [groups[i] for i in order[k : k + args.rows]])
            torch.nn.utils.clip_grad_norm_(list(tuner.trainable().values()), 1.0)
            optimizer.step()
            print(f"step {number}: " + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    tuner.save(args.out, str(materialise(args.model, find_home())))
    print(f"the adapter is in {args.out}; peft.PeftModel.from_pretrained opens it")


def training_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what is trained: a catalogue name or a model folder")
    parser.add_argument("data", type=Path, help="chat rows, in any format that the project reads")
    parser.add_argument("--out", type=Path, default=Path("adapter"))
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rows", type=int, default=8, help="in one optimizer step")
    parser.add_argument("--rate", type=float, default=2e-4)
    return parser


def main() -> None:
    args = training_parser(__doc__).parse_args()
    folder = materialise(args.model, find_home().ensure())
    tuner = LoRA(LoRA.Options(r=16, alpha=32))
    policy = Policy(tuner.attach(load_model(folder), seed=0))
    train(policy, SFT(SFT.Options()), tuner, read_rows(args.data, folder), args)


if __name__ == "__main__":
    main()
