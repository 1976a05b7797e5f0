"""RLHF as one job from Python: supervised training, a reward model, PPO; then how the reward model scores both models.

    python recipes/rlhf.py smollm2-135m-instruct chats.jsonl pairs.jsonl prompts.jsonl held-out-prompts.jsonl

The chain is what `tunewright train` makes of `chain: rlhf`, so Ctrl-C saves, and the command that it prints goes on
where it stopped. What is inside a step is in dpo.py and grpo.py; this shows the stages and what comes out of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from tunewright.cli.chain import new_chain, train_chain
from tunewright.core.home import Home, find_home
from tunewright.core.run import Run, find_artefact
from tunewright.data.asking import prompt_of
from tunewright.data.validate import check_file, raise_for, read_conversations
from tunewright.engine.engine import Engine
from tunewright.engine.request import AskedRow, GenerateRequest, RowsRequest


def train(home: Home, args: argparse.Namespace) -> Run:
    """Run the three stages; the last one's run, which started from the supervised model."""
    ppo = {"objective": {"max_completion_tokens": args.tokens}, "training_file": str(args.prompts)}
    stages = {"sft": str(args.chats), "reward": str(args.pairs), "ppo": {**ppo, "n_epochs": args.ppo_epochs}}
    common = {"model": args.model, "n_epochs": args.epochs, "batch_size": args.batch, "seed": 0}
    console = Console()
    chain = new_chain(home, {"chain": "rlhf", "stages": stages, **common}, console)
    last, end = train_chain(home, chain, console)
    if end.data.get("status") != "succeeded":
        raise SystemExit(1)
    return last


def read_prompts(path: Path) -> list[list[dict[str, Any]]]:
    """Prompts, or chat rows up to their last answer. Raises DataError with every bad row."""
    report = check_file(path, purpose_shapes=("prompt", "chat"), min_examples=1)
    raise_for(report, what="validation")
    return [prompt_of(row) for row in read_conversations(path, report.format)]


def mean_score(engine: Engine, model: Path, judge: Path, prompts: list[list[dict[str, Any]]], tokens: int) -> float:
    """What the reward model in `judge` says of the model's answers, one to each prompt, on average."""
    rows = []
    for number, prompt in enumerate(prompts):
        asked = GenerateRequest(artefact=str(model), messages=prompt, max_tokens=tokens, temperature=1.0, seed=number)
        text = engine.generate(asked)["choices"][0]["text"]
        rows.append(AskedRow(messages=[*prompt, {"role": "assistant", "content": text}]))
    return fmean(found["score"] for found in engine.rows.judge(RowsRequest(artefact=str(judge), rows=rows))["results"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a catalogue name or a model folder")
    parser.add_argument("chats", type=Path, help="chat rows, for supervised training")
    parser.add_argument("pairs", type=Path, help="preference pairs, for the reward model")
    parser.add_argument("prompts", type=Path, help="prompts, for PPO")
    parser.add_argument("held_out", type=Path, help="other prompts, to compare the models on")
    parser.add_argument("--epochs", type=int, default=1, help="of the first two stages")
    parser.add_argument("--ppo-epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    args = parser.parse_args()

    home = find_home().ensure()
    prompts = read_prompts(args.held_out)
    last = train(home, args)
    names = {"supervised": last.job().spec.model, "PPO": last.job().name}
    judge = find_artefact(home, last.job().spec.objective.options["reward_model"])
    engine = Engine(home)
    for what, name in names.items():
        score = mean_score(engine, find_artefact(home, name), judge, prompts, args.tokens)
        print(f"{what} {name}: mean score {score:.3f} on {len(prompts)} held-out prompts", flush=True)


if __name__ == "__main__":
    main()
