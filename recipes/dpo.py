"""DPO from the project's parts: pairs, a fresh LoRA, the adapter off for the reference, one step after another.

    python recipes/dpo.py smollm2-135m-instruct pairs.jsonl --out adapter

Read it from top to bottom. `tunewright train` with `objective: dpo` does more (exact resume, plan, validation, the fast
path); this shows what a step is.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch

from tunewright.core.example import Group
from tunewright.core.home import find_home
from tunewright.data.render import render_rows
from tunewright.data.tokenizer import Tokenizer
from tunewright.data.validate import check_file, raise_for, read_conversations
from tunewright.models.loader import load_model, materialise
from tunewright.models.policy import Policy
from tunewright.objectives.dpo import DPO
from tunewright.ops.packing import pack
from tunewright.train.optim.adamw import AdamW
from tunewright.train.reference import Reference
from tunewright.tuners.lora import LoRA


def read_pairs(data: Path, folder: Path) -> list[Group]:
    """The rows as pairs of token sequences that share their prompt. Raises DataError with every bad row."""
    report = check_file(data, purpose_shapes=("preference",), method="dpo", min_examples=1)
    raise_for(report, what="training")
    rows = read_conversations(data, report.format)
    return list(render_rows(rows, Tokenizer.load(folder), shape="preference", max_length=1024, overlong="drop"))


def step(policy: Policy, objective: DPO, pairs: list[Group]) -> tuple[float, float]:
    """Leave the gradients of the mean loss over `pairs` on the parameters; returns (loss, margin)."""
    batches = pack(pairs, micro_batch_tokens=2048, share=policy.shares_prefixes)  # a prompt is computed once
    weight = sum(objective.weights(batch)["loss"] for batch in batches)
    loss = margin = 0.0
    for batch in batches:
        terms = objective(policy, batch.to(policy.device))
        (terms["loss"].total / weight).backward()
        loss += terms["loss"].total.item() / weight
        margin += terms["reward_margin"].total.item() / weight
    return loss, margin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a catalogue name or a model folder")
    parser.add_argument("data", type=Path, help="pairs, in any format that the project reads")
    parser.add_argument("--out", type=Path, default=Path("adapter"))
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=8, help="in one optimizer step")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--rate", type=float, default=1e-4)
    args = parser.parse_args()

    folder = materialise(args.model, find_home().ensure())
    groups = read_pairs(args.data, folder)
    tuner = LoRA(LoRA.Options(r=16, alpha=32))
    policy = Policy(tuner.attach(load_model(folder), seed=0))
    objective = DPO(DPO.Options(beta=args.beta))
    objective.reference = Reference(policy, tuner.off)  # the model at step 0: a fresh adapter, switched off
    optimizer = AdamW.build(tuner.trainable(), args.rate, AdamW.Options())
    number = 0
    for epoch in range(args.epochs):
        order = random.Random(epoch).sample(range(len(groups)), len(groups))
        for k in range(0, len(order), args.pairs):
            number += 1
            optimizer.zero_grad()
            loss, margin = step(policy, objective, [groups[i] for i in order[k : k + args.pairs]])
            torch.nn.utils.clip_grad_norm_(list(tuner.trainable().values()), 1.0)
            optimizer.step()
            print(f"step {number}: loss {loss:.4f}, margin {margin:.4f}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    tuner.save(args.out, str(folder))
    print(f"the adapter is in {args.out}; peft.PeftModel.from_pretrained opens it")


if __name__ == "__main__":
    main()
