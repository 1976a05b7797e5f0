"""GRPO from the project's parts: the model answers, a grader rewards, answers better than their group become likelier.

    python recipes/grpo.py smollm2-135m-instruct prompts.jsonl grader.json --out adapter

A line of prompts.jsonl: {"messages": [...], "answer": "…"}. grader.json: OpenAI's grader, such as {"type":
"string_check", "name": "right", "operation": "ilike", "input": "{{ sample.output_text }}", "reference":
"{{ item.answer }}"}. Read it from top to bottom. `tunewright train` with `objective: grpo` does more (every answer
kept, exact resume, validation, the fast path); this shows what a step is.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from statistics import fmean

import torch

from tunewright.core.example import Group
from tunewright.core.home import find_home
from tunewright.data.render import render_rows
from tunewright.data.tokenizer import Tokenizer
from tunewright.data.validate import check_file, raise_for, read_conversations
from tunewright.engine.engine import Engine
from tunewright.engine.held import NAME, engine_over, serving
from tunewright.engine.request import GenerateRequest
from tunewright.engine.scheduler import Limits
from tunewright.graders.base import Grader, Sample, parse_grader
from tunewright.models.loader import context_length, load_model, materialise
from tunewright.models.policy import Policy
from tunewright.objectives.grpo import GRPO
from tunewright.objectives.rollouts import Rolled
from tunewright.ops.packing import pack
from tunewright.train.optim.adamw import AdamW
from tunewright.train.reference import Reference
from tunewright.train.rollouts import Answer, group_of, with_numbers
from tunewright.tuners.lora import LoRA


def read_prompts(data: Path, folder: Path) -> list[Group]:
    """The rows as token ids up to where the answer begins. Raises DataError with every bad row."""
    report = check_file(data, format="reinforcement", purpose_shapes=("prompt",), method="grpo", min_examples=1)
    raise_for(report, what="training")
    rows = read_conversations(data, report.format)
    return list(render_rows(rows, Tokenizer.load(folder), shape="prompt", max_length=1024, overlong="drop"))


def answers(engine: Engine, policy: Policy, prompts: list[Group], o: GRPO.Options, seed: int) -> list[list[Answer]]:
    """A group of answers to each prompt, sampled by the engine from the weights that are trained."""
    running = []
    with serving(policy.model):
        for prompt in prompts:
            (one,) = prompt.examples
            how = {"n": o.group_size, "max_tokens": o.max_completion_tokens, "seed": seed * 1_000_003 + one.source}
            asked = GenerateRequest.model_validate({"base": NAME, "prompt": list(one.ids), **how})
            running.append(engine.requests[engine.add_request(asked, lambda event: None)])
        while engine.step():
            pass
    return [[Answer(tuple(s.tokens[s.n_prompt :]), s.text.shown, "") for s in r.sequences] for r in running]


def judged(prompts: list[Group], found: list[list[Answer]], grader: Grader, to: GRPO) -> tuple[list[Group], float]:
    """(the groups that say something, their tokens with advantages; the mean reward of all)."""
    items = [json.loads(p.examples[0].item or "{}") for p in prompts]
    rewards = [[grader.grade(i, Sample(a.text)).reward for a in own] for i, own in zip(items, found, strict=True)]
    groups = []
    for prompt, own, got in zip(prompts, found, rewards, strict=True):
        (numbers,) = to.credit([[Rolled(r, len(a.tokens)) for a, r in zip(own, got, strict=True)]])
        if max(got) > min(got):
            groups.append(with_numbers(group_of(prompt.examples[0], own), numbers))
    return groups, fmean(r for got in rewards for r in got)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a catalogue name or a model folder")
    parser.add_argument("data", type=Path)
    parser.add_argument("grader", type=Path)
    parser.add_argument("--out", type=Path, default=Path("adapter"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=4, help="in one optimizer step")
    parser.add_argument("--answers", type=int, default=8, help="to each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most")
    parser.add_argument("--rate", type=float, default=1e-4)
    args = parser.parse_args()

    home = find_home().ensure()
    folder = materialise(args.model, home)
    prompts, tuner = read_prompts(args.data, folder), LoRA(LoRA.Options(r=16, alpha=32))
    policy = Policy(tuner.attach(load_model(folder), seed=0))
    objective = GRPO(GRPO.Options(group_size=args.answers, max_completion_tokens=args.tokens))
    objective.reference = Reference(policy, tuner.off)  # the model at step 0: a fresh adapter, switched off
    engine = engine_over(policy.model, Tokenizer.load(folder), context_length(folder), home, Limits(max_waiting=4096))
    optimizer = AdamW.build(tuner.trainable(), args.rate, AdamW.Options())
    with parse_grader(json.loads(args.grader.read_text())) as grader:
        for number in range(1, args.steps + 1):
            chosen = random.Random(number).sample(prompts, min(args.prompts, len(prompts)))
            found = answers(engine, policy, chosen, objective.options, number)
            groups, reward = judged(chosen, found, grader, objective)
            batches = pack(groups, micro_batch_tokens=2048, share=policy.shares_prefixes)
            weight = sum(objective.weights(batch)["loss"] for batch in batches)
            optimizer.zero_grad()
            for batch in batches:
                terms = objective(policy, batch)
                sum(t.coef * t.total / weight for t in terms.values() if t.coef).backward()  # type: ignore[union-attr]
            torch.nn.utils.clip_grad_norm_(list(tuner.trainable().values()), 1.0)
            if batches:
                optimizer.step()
            print(f"step {number}: mean reward {reward:.3f}, groups that differ {len(groups)}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    tuner.save(args.out, str(folder))
    print(f"the adapter is in {args.out}; peft.PeftModel.from_pretrained opens it")


if __name__ == "__main__":
    main()
