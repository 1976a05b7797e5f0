"""Proxy-tuning for real: does tuning a part of the model move the whole one, which stays as it is, towards the task?

    python -m benchmarks.proxy

The large model is SmolLM2-135M-Instruct. The small one is its first layers with its embeddings and its last norm,
brought back to speech by distillation from the large one: what that would say after every token of other chats and of
the demo's rows, where both have to agree as long as nobody is tuned. Then it is tuned on the demo's rows. Recipes over
the three answer the demo's held-out messages at several alphas, beside all three alone: right answers, and the loss
(nats a token) of the right answer, which is what tuning lowers. The result goes to results/proxy.json, and is not
measured again while it is there; at the end docs/methods.md is written.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.figures import machine
from benchmarks.methods_more import is_moved
from benchmarks.methods_page import PAGE, RESULTS, write_page
from benchmarks.ours import Place, placed
from benchmarks.pieces import Piece, key_of, run_pieces
from benchmarks.process import run_ours
from benchmarks.rivals.shared import Task
from benchmarks.settings import MODEL, say
from tunewright.core.durable import read_json, sha256_file, write_json
from tunewright.core.recipe import parse_recipe_spec
from tunewright.core.run import Run, find_artefact
from tunewright.core.spec import JobSpec
from tunewright.data.demo import HELDOUT, TRAIN, ClinicRow, load
from tunewright.data.tokenizer import TOKENIZER_FILES, Tokenizer
from tunewright.engine.client import EngineSession
from tunewright.evals import clinic
from tunewright.evals.compare import Variant, replies
from tunewright.jobs.recipes import build_recipe
from tunewright.models.loader import load_model, materialise

SPEECH = Path(__file__).parent / "data" / "short.jsonl"
WHERE = RESULTS / "proxy.json"  # of what docs/methods.md shows
LARGE, SMALL, TUNED = "large", "small", "small, tuned"
# how the small model is distilled, and how it is tuned
DISTILLED = {"objective": {"name": "distill", "teacher": MODEL}, "n_epochs": 1, "learning_rate": 5e-4}
LEARNED = {"objective": "sft", "n_epochs": 3, "learning_rate": 5e-4}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", type=Path, default=WHERE, help="where the result goes (%(default)s)")
    p.add_argument("--layers", type=int, default=8, help="of the small model (%(default)s)")
    p.add_argument("--alphas", default="0.5,1", help="factors to try (%(default)s)")
    p.add_argument("--rows", type=int, default=40, help="held-out rows (%(default)s)")
    p.add_argument("--threads", type=int, default=None, help="CPU threads (all cores)")
    p.set_defaults(model=MODEL, dtype="auto")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    settings = [args.layers, args.alphas, args.rows, DISTILLED, LEARNED]
    key = key_of(settings, [SPEECH, TRAIN, HELDOUT])
    with placed(args) as place:
        torch.set_num_threads(place.threads)
        failed = run_pieces([Piece("proxy-tuning", args.json, key, partial(measure, place, args))], tell)
    if args.json == WHERE:
        write_page()
        say(f"{PAGE} is written.")
    return 1 if failed else 0


def tell(found: dict[str, Any]) -> str:
    systems = found["systems"]
    moved = [n for n in systems if n.startswith("proxy") and is_moved(systems[n], systems[LARGE])]
    return f"moved towards the task: {', '.join(moved) or 'none'}"


def measure(place: Place, args: argparse.Namespace) -> dict[str, Any]:
    """{"systems": {name: losses of the rows, what was right}} and what it was measured with."""
    about, large, heldout = machine(place.threads), materialise(MODEL, place.home), load(HELDOUT)[: args.rows]
    first = cut_layers(large, place.work / "first-layers", args.layers)
    say("  the small model learns to speak")
    small = train(place, "speech", str(first), speech(place.work / "speech.jsonl"), DISTILLED)
    say("  the small model is tuned")
    tuned = train(place, "tuned", small, TRAIN, LEARNED)
    alphas = [float(a) for a in args.alphas.split(",")]
    parts = {SMALL: find_artefact(place.home, small), TUNED: find_artefact(place.home, tuned)}
    variants = [Variant(LARGE, "", base=MODEL), *(Variant(n, "", artefact=f) for n, f in parts.items())]
    variants += [Variant(f"proxy, alpha {a:g}", "", artefact=proxy(place, small, tuned, a)) for a in alphas]
    losses = all_losses({LARGE: large, **parts}, alphas, heldout)
    with EngineSession(place.home, place.threads) as engine:
        right = {v.system: outcomes(engine, v, heldout) for v in variants}
    return {
        "model": MODEL,
        "layers": args.layers,
        "rows": len(heldout),
        "speech": {"name": SPEECH.name, "sha256": sha256_file(SPEECH)[:16]},
        "distilled": DISTILLED,
        "learned": LEARNED,
        "systems": {name: {"losses": losses[name], **right[name]} for name in right},
        "machine": about,
    }


def cut_layers(source: Path, target: Path, n: int) -> Path:
    """The first n layers of a model as a model, in the folder `target`."""
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
    return target


def speech(path: Path) -> Path:
    """The rows of both files as chat rows."""
    lines = [json.loads(line) for line in SPEECH.read_text(encoding="utf-8").splitlines()]
    said = [json.dumps({"messages": [*row["prompt"], *row["completion"]]}) + "\n" for row in lines]
    path.write_text("".join(said) + TRAIN.read_text(encoding="utf-8"), encoding="utf-8")
    return path


def train(place: Place, name: str, model: str, data: Path, settings: dict[str, Any]) -> str:
    """A job over all weights, as a user runs it; the name of its model."""
    options = {"tuner": "full", "schedule": JobSpec.model_fields["schedule"].default.model_dump(), **settings}
    task = Task(model=model, data=str(data), out=str(place.work / name), seed=7, steps=1 << 30, threads=place.threads,
                dtype=place.dtype, options=options)  # fmt: skip
    return Run(Path(run_ours(task, model, place.home, limit_s=3600.0).facts["run"])).job().name


def proxy(place: Place, small: str, tuned: str, alpha: float) -> Path:
    recipe = {"name": "proxy", "small": small, "tuned": tuned, "alpha": alpha}
    folder = place.work / f"proxy-{alpha:g}"
    return build_recipe(place.home, folder, folder.name, parse_recipe_spec({"recipe": recipe, "model": MODEL}), ())


def outcomes(engine: EngineSession, variant: Variant, heldout: Sequence[ClinicRow]) -> dict[str, list[bool]]:
    """{measure: [rows] right or wrong} of the greedy answers."""
    say(f"  {variant.system} answers")
    chats = clinic.prompts(clinic.TUNED, [], heldout)
    answers = [r.text for r in replies(engine, chats, variant, clinic.MAX_TOKENS)]
    return clinic.score(variant.system, answers, heldout).outcomes


@torch.inference_mode()
def all_losses(folders: dict[str, Path], alphas: Sequence[float], rows: Sequence[ClinicRow]) -> dict[str, list[float]]:
    """[rows] mean negative log-probability of the right answer's tokens, of each model and of each proxy."""
    tokenizer, nets = Tokenizer.load(folders[LARGE]), {name: load_model(f) for name, f in folders.items()}
    found: dict[str, list[float]] = {}
    for row in rows:
        prompt = tokenizer.encode_chat([{"role": "user", "content": row.message}])
        answer = tokenizer.encode(f"{row.answer}<|im_end|>")[0]
        logits = {name: answer_logits(net, prompt, answer) for name, net in nets.items()}
        for a in alphas:
            logits[f"proxy, alpha {a:g}"] = logits[LARGE] + a * (logits[TUNED] - logits[SMALL])
        for name, logits_TV in logits.items():
            logp_T = logits_TV.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
            found.setdefault(name, []).append(-float(logp_T.mean()))
    return found


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
    sys.exit(main())
