"""GRPO with LoRA side by side: tunewright and TRL's GRPOTrainer, as it comes and at its best on a CPU.

    python -m benchmarks.grpo --data benchmarks/data/short.jsonl --json grpo.json

Both answer the same prompts in the same order, so many times each, and learn from the same reward: how alike the
answer and the row's own are, which differs between any two answers. Neither looks at a reference, which is TRL's
default. The model is a copy whose end token is one that it cannot say: every answer of both has its full length, so
that completions a second compare. With --natural the model is as it is, answers end where it ends them, and the mean
lengths are beside the rates.

First the gates, in float32 and in the dtype that is measured: the answers of our first step are given to TRL instead of
ones that it samples, and its rewards, loss and gradient norm must be ours. Each process has its turn, as in dpo.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.figures import machine
from benchmarks.gates import GRADIENT, Gate
from benchmarks.ours import Place, placed
from benchmarks.process import Outcome, RivalFailed
from benchmarks.rivals.shared import Row, token_hash
from benchmarks.settings import say, stop_like_ctrl_c, write
from benchmarks.side_by_side import Sides, conclude, judged, measure, sides_of, sides_parser
from benchmarks.table import FUSED, TUNED, Rival
from tunewright.data.render import render_rows
from tunewright.data.tokenizer import Tokenizer
from tunewright.data.validate import read_conversations

BATCH, GROUP, TOKENS, RATE = 4, 8, 64, 2e-5
GATE_BATCH = 2
# float32: rewards, and what sums in another order leave of a loss; half: what bfloat16 leaves of it
SAME, EXACT, EXACT_GRADIENT, CURVE = 1e-6, 1e-4, 1e-3, 0.02
GRADER = {
    "type": "text_similarity", "name": "alike", "evaluation_metric": "fuzzy_match",
    "input": "{{ sample.output_text }}", "reference": "{{ item.answer }}",
}  # fmt: skip
NEVER = "<|never|>"
TRL = Rival("trl_grpo.py", trl=True)
RIVALS = {
    "ours": Rival(None),
    "trl_default": TRL,
    "trl_best": replace(TRL, env=TUNED, options=FUSED),
    # what else may be its best; not transformers' continuous batching, which takes more memory than this is about
    "trl_half": replace(TRL, options=FUSED),
    "trl_parts": replace(TRL, env=TUNED, options={**FUSED, "gradient_accumulation_steps": 4}),
    "trl_static": replace(TRL, env=TUNED, options={**FUSED, "cache_implementation": "static"}),
}
DEFAULT = ("ours", "trl_default", "trl_best")


@dataclass(frozen=True)
class Setup:
    """One comparison. exact: the same sides with the model as it is. group: answers to a prompt. tokens: of an answer
    at most; full: whether each has that many. train, gate: the prompts, and the gates' few. prompts: hash of those.
    """

    sides: Sides
    exact: Sides
    group: int
    tokens: int
    full: bool
    train: Path
    gate: Path
    prompts: str

    def run(self, sides: Sides, name: str, folder: str, data: Path, given: Path | None = None, **more: Any) -> Outcome:
        """One process. given: answers to train on instead of sampled ones, for TRL."""
        objective = {"name": "grpo", "grader": GRADER, "group_size": self.group, "kl_coefficient": 0.0}
        options: dict[str, Any] = {"objective": {**objective, "max_completion_tokens": self.tokens}}
        if sides.rivals[name].program is not None:
            options = {"num_generations": self.group, "max_completion_length": self.tokens}
            options |= {} if given is None else {"given": str(given)}
        return sides.run(name, folder, data, look=answers_of, options=options, curve=True, **more)


def answers_of(run: Path) -> dict[str, Any]:
    """What our job keeps of its answers: [(tokens, reward)], and the tokens of each."""
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    return {"answers": [(x["n_tokens"], x["reward"]) for x in lines], "tokens": [x["tokens"] for x in lines]}


def gates(s: Setup) -> Iterator[Gate]:
    """Our first step in float32 and in the dtype that is measured, and what TRL makes of the same answers."""
    rivals = [name for name in s.sides.only if name != "ours"]
    for dtype, names in {"float32": rivals and ["trl_default"], s.sides.dtype: rivals}.items():
        say(f"gates: a step of ours in {dtype}")
        short: dict[str, Any] = {"dtype": dtype, "steps": 1, "batch": GATE_BATCH, "epochs": 1}
        ours = s.run(s.exact, "ours", f"gate-{dtype}-ours", s.gate, **short)
        norm = ours.steps[0].grad_norm or 0.0
        yield Gate(f"{dtype}: ours has a gradient", norm > 0, f"norm {norm:.4f}")
        given = s.sides.place.work / f"given-{dtype}.json"
        given.write_text(json.dumps(ours.facts["tokens"]))
        for name in names:
            say(f"gates: the same step of {name}")
            theirs = s.run(s.exact, name, f"gate-{dtype}-{name}", s.gate, given, **short)
            yield Gate(f"{name}: tokens of the prompts", theirs.facts["token_hash"] == s.prompts, s.prompts)
            yield from against(f"{name} in {dtype}", theirs, ours, dtype == "float32")


def against(name: str, theirs: Outcome, ours: Outcome, exact: bool) -> Iterator[Gate]:
    """Rewards, loss and gradient norm of one step over the same answers."""
    lengths, rewards = ([[x[i] for x in run.facts["answers"]] for run in (theirs, ours)] for i in (0, 1))
    off = max(abs(a - b) for a, b in zip(*rewards, strict=True))
    detail = f"{len(rewards[1])} off by up to {off:.1e}, mean {fmean(rewards[1]):.3f}"
    yield Gate(f"{name}: rewards", off <= SAME and lengths[0] == lengths[1], detail)
    a, b = theirs.steps[0], ours.steps[0]
    far = abs((a.loss if a.loss is not None else 9.0) - (b.loss or 0.0))
    yield Gate(f"{name}: loss", far <= (EXACT if exact else CURVE), f"{a.loss}, ours {b.loss}, off by {far:.1e}")
    turned = abs((a.grad_norm or 0.0) / (b.grad_norm or 1e-9) - 1)
    ok = turned <= (EXACT_GRADIENT if exact else GRADIENT)
    yield Gate(f"{name}: gradient norm", ok, f"{a.grad_norm}, ours {b.grad_norm}, off by {turned:.2%}")


def figures_of(s: Setup, outcome: Outcome) -> dict[str, Any]:
    """Of all answers of a run. Raises RivalFailed where answers are shorter than they are to be or a step learned
    nothing: such a rate compares with no other."""
    lengths, rewards = ([x[i] for x in outcome.facts["answers"]] for i in (0, 1))
    if s.full and set(lengths) != {s.tokens}:
        raise RivalFailed(f"answers have {min(lengths)} to {max(lengths)} tokens, not {s.tokens}")
    if not all(step.grad_norm for step in outcome.steps):
        raise RivalFailed("a step has no gradient: its rewards say nothing. Use rows with longer answers.")
    groups = [rewards[k : k + s.group] for k in range(0, len(rewards), s.group)]
    dead = fmean(max(g) - min(g) < SAME for g in groups)
    return {"completion_tokens_mean": fmean(lengths), "mean_reward": fmean(rewards), "dead_share": dead}


def without_end(source: Path, folder: Path) -> Path:
    """A copy of a model whose end token is one that it has no logit for."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "MANIFEST.json"))
    for weights in source.glob("*.safetensors"):
        (folder / weights.name).symlink_to(weights)
    names = ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json")
    files = {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in names}
    added = files["tokenizer.json"]["added_tokens"]
    known = {*files["tokenizer.json"]["model"]["vocab"].values(), *(token["id"] for token in added)}
    number = max(known) + 1
    if number < files["config.json"]["vocab_size"]:
        sys.exit(f"--model: {source.name} has a logit for token {number}, which no text has. Use --natural.")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added.append({"id": number, "content": NEVER, **flags, "special": True})
    files["tokenizer_config.json"]["eos_token"] = NEVER
    for name in ("config.json", "generation_config.json"):
        files[name]["eos_token_id"] = number
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return folder


def make_prompts(data: Path) -> list[str]:
    """Rows {"messages", "answer"} of prompt/completion rows."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    made = ({"messages": row["prompt"], "answer": row["completion"][-1]["content"]} for row in rows)
    return [json.dumps(row, ensure_ascii=False) for row in made]


def prompt_hash(data: Path, folder: Path) -> str:
    """Over the prompts' tokens as our worker reads them."""
    rows, tokenizer = read_conversations(data, "reinforcement", data.name), Tokenizer.load(folder, now=datetime.now())
    groups = render_rows(rows, tokenizer, shape="prompt", max_length=1 << 20)
    return token_hash([Row(list(g.examples[0].ids), []) for g in groups])


def setup(args: argparse.Namespace, place: Place) -> Setup:
    from tunewright.models.loader import materialise

    rows = make_prompts(args.data)
    whole = len(rows) // args.batch * args.batch  # TRL leaves out a step that is not whole
    if whole < args.batch or len(rows) < GATE_BATCH:
        sys.exit(f"--data: {args.data} has {len(rows)} rows; {max(GATE_BATCH, args.batch)} are needed")
    folder = materialise(args.model, place.home)
    model = args.model if args.natural else str(without_end(folder, place.work / "model"))
    exact, gate = sides_of(args, place, RIVALS, RATE), write(place.work / "gate.jsonl", rows[:GATE_BATCH])
    return Setup(
        sides=replace(exact, model=model),
        exact=exact,
        group=args.group,
        tokens=args.tokens,
        full=not args.natural,
        train=write(place.work / "prompts.jsonl", rows[:whole]),
        gate=gate,
        prompts=prompt_hash(gate, folder),
    )


def main(argv: Sequence[str] | None = None) -> int:
    p = sides_parser(__doc__, RIVALS, DEFAULT, BATCH, "prompts", seconds=45.0)
    p.add_argument("--group", type=int, default=GROUP, help="answers to a prompt (%(default)s)")
    p.add_argument("--tokens", type=int, default=TOKENS, help="of an answer, at most with --natural (%(default)s)")
    p.add_argument("--natural", action="store_true", help="answers end where the model ends them")
    args = p.parse_args(argv)
    stop_like_ctrl_c()
    begun = time.monotonic()
    with placed(args) as place:
        about, rows = machine(place.threads), list[dict[str, Any]]()
        s = setup(args, place)

        def all_rounds() -> None:
            measure(
                s.sides.only,
                args.rounds,
                lambda name, at: s.run(s.sides, name, at, s.train),
                "completions",
                args.batch * args.group,
                rows,
                lambda outcome: figures_of(s, outcome),
            )

        passed = judged(gates(s), all_rounds)
    names = ("model", "batch", "group", "tokens", "natural", "rounds", "seconds")
    settings = {name: getattr(args, name) for name in names} | {"lr": RATE, "dtype": s.sides.dtype}
    about = {"settings": {**settings, "data": args.data.name}, "machine": about, "seconds": time.monotonic() - begun}
    return conclude(rows, passed, about, args.json, rate="completions_per_second")


if __name__ == "__main__":
    sys.exit(main())
