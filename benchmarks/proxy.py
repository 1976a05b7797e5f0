"""Proxy-tuning for real: does tuning a part of the model move the whole one, which stays as it is, towards the task?

    python -m benchmarks.proxy --json proxy.json

The large model is SmolLM2-135M-Instruct. The small one is its first layers with its embeddings and its last norm,
brought back to speech by plain supervised training on the large one's own answers; then it is tuned on the demo's
rows. Recipes over the three answer the demo's held-out messages at several alphas, beside all three alone: the share
of right answers, and the loss (nats a token) of the right answer, which is what tuning lowers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.figures import machine
from benchmarks.settings import save, say
from tunewright.core.durable import read_json, write_json
from tunewright.core.home import Home, find_home
from tunewright.core.ids import parse_model_name
from tunewright.core.recipe import parse_recipe_spec
from tunewright.core.run import find_artefact, list_runs
from tunewright.data.demo import HELDOUT, TRAIN, ClinicRow, load
from tunewright.data.tokenizer import TOKENIZER_FILES, Tokenizer
from tunewright.engine.client import EngineSession
from tunewright.evals import clinic
from tunewright.evals.compare import Variant, replies
from tunewright.jobs.recipes import build_recipe
from tunewright.models.loader import load_model, materialise
from tunewright.ops.runtime import set_threads

MODEL = "smollm2-135m-instruct"
ASKS = ("{}", "Say in one sentence what this message is about: {}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proxy", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", default="-", help="where the result goes; - prints it")
    parser.add_argument("--layers", type=int, default=8, help="of the small model")
    parser.add_argument("--epochs", type=int, default=2, help="of the small model on the large one's answers")
    parser.add_argument("--alphas", default="0.5,1,1.5", help="factors to try")
    parser.add_argument("--rows", type=int, default=100, help="held-out rows")
    parser.add_argument("--threads", default="auto")
    args = parser.parse_args()
    set_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="proxy-") as place:
        result = run(Path(place), args)
    save(result, args.json)


def run(place: Path, args: argparse.Namespace) -> dict[str, Any]:
    source, home = materialise(MODEL, find_home()), Home(place / "home").ensure()
    large = home.models / MODEL
    shutil.copytree(source, large)
    heldout = load(HELDOUT)[: args.rows]
    cut_layers(large, home.models / "first-layers", args.layers)
    say("the large model answers")
    taught = write_answers(home, load(TRAIN), place / "answers.jsonl")
    say("the small model learns from its answers")
    small = train(home, "first-layers", taught, args, tuner="full", n_epochs=args.epochs, learning_rate=5e-4)
    say("the small model is tuned")
    tuned = train(home, small, TRAIN, args, tuner="full", n_epochs=3, learning_rate=2e-4)
    variants = [Variant("large", "", base=MODEL), *(Variant(n, "", artefact=where(home, m)) for n, m in
                (("small", small), ("small, tuned", tuned)))]  # fmt: skip
    alphas = [float(a) for a in args.alphas.split(",")]
    variants += [Variant(f"proxy, alpha {a:g}", "", artefact=proxy(home, place, small, tuned, a)) for a in alphas]
    losses = all_losses(home, [large, where(home, tuned), where(home, small)], alphas, heldout)
    return {
        "machine": machine(),
        "layers": args.layers,
        "rows": len(heldout),
        "systems": {v.system: {**scores(home, v, heldout), "loss": losses[v.system]} for v in variants},
    }


def cut_layers(source: Path, target: Path, n: int) -> None:
    """The first n layers of a model as a model."""
    target.mkdir()
    config = read_json(source / "config.json")
    names = {f"model.layers.{i}." for i in range(n, config["num_hidden_layers"])}
    tensors = {k: v for f in source.glob("*.safetensors") for k, v in load_file(f).items()}
    kept = {k: v for k, v in tensors.items() if not any(k.startswith(name) for name in names)}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    write_json(target / "config.json", {**config, "num_hidden_layers": n, "layer_types": None})
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_answers(home: Home, rows: Sequence[ClinicRow], path: Path) -> Path:
    """What the large model says to several requests about each training message, sampled, as chat rows."""
    chats = [[{"role": "user", "content": ask.format(row.message)}] for row in rows for ask in ASKS]
    with EngineSession(home) as engine:
        said = replies(engine, chats, Variant("large", "", base=MODEL), 64)
        lines = [
            json.dumps({"messages": [*chat, {"role": "assistant", "content": reply.text or "."}]})
            for chat, reply in zip(chats, said, strict=True)
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def train(home: Home, model: str, data: Path, args: argparse.Namespace, **fields: Any) -> str:
    """A foreground job, as a user runs it; the name of its model."""
    spec = {"model": model, "training_file": str(data), "batch_size": 16, "seed": 7, "threads": args.threads, **fields}
    command = [sys.executable, "-m", "tunewright.cli.main", "train", "--home", str(home.root)]
    subprocess.run([*command, *(w for k, v in spec.items() for w in ("--set", f"{k}={v}"))], check=True, stdout=2)
    return list_runs(home)[-1].job().name


def where(home: Home, name: str) -> Path:
    return home.models / name if parse_model_name(name) is None else find_artefact(home, name)


def proxy(home: Home, place: Path, small: str, tuned: str, alpha: float) -> Path:
    recipe = {"name": "proxy", "small": small, "tuned": tuned, "alpha": alpha}
    folder = place / f"proxy-{alpha:g}"
    return build_recipe(home, folder, folder.name, parse_recipe_spec({"recipe": recipe, "model": MODEL}), ())


def scores(home: Home, variant: Variant, heldout: Sequence[ClinicRow]) -> dict[str, Any]:
    say(f"{variant.system} answers")
    with EngineSession(home) as engine:
        chats = clinic.prompts(clinic.TUNED, [], heldout)
        answers = [r.text for r in replies(engine, chats, variant, clinic.MAX_TOKENS)]
    card = clinic.score(variant.system, answers, heldout)
    return {m: asdict(i) for m in card.outcomes if (i := card.share(m)) is not None} | {"first": answers[:3]}


@torch.inference_mode()
def all_losses(
    home: Home, folders: Sequence[Path], alphas: Sequence[float], rows: Sequence[ClinicRow]
) -> dict[str, float]:
    """Mean negative log-probability of a token of the right answers, of each model and of each proxy."""
    tokenizer, nets = Tokenizer.load(folders[0]), [load_model(f) for f in folders]
    total: dict[str, float] = {}
    n = 0
    for row in rows:
        prompt = tokenizer.encode_chat([{"role": "user", "content": row.message}])
        answer = tokenizer.encode(f"{row.answer}<|im_end|>")[0]
        n += len(answer)
        large, tuned, small = (answer_logits(net, prompt, answer) for net in nets)
        moved = {f"proxy, alpha {a:g}": large + a * (tuned - small) for a in alphas}
        for name, logits_TV in {"large": large, "small, tuned": tuned, "small": small, **moved}.items():
            logp_T = logits_TV.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
            total[name] = total.get(name, 0.0) - float(logp_T.sum())
    return {name: value / n for name, value in total.items()}


def answer_logits(net: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """[T, V] of the answer's tokens."""
    ids = torch.tensor([*prompt, *answer])
    out = net(
        input_ids=ids[None],
        position_ids=torch.arange(len(ids))[None],
        cu_seqlens=[0, len(ids)],
        use_cache=False,
    ).logits[0]
    return out[len(prompt) - 1 : -1].float()


if __name__ == "__main__":
    main()
