"""Do I need to tune at all? `tunewright recipe compare` over the demo, measured and kept for docs/methods.md.

    python -m benchmarks.untuned

The demo's model is trained as `tunewright demo` trains it; then base, prompts, few-shot, retrieval and tuned model
answer the held-out messages. Each variant leaves one JSON file under results/untuned/: what is there is not run again,
so Ctrl-C loses nothing. At the end docs/methods.md is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.figures import machine
from benchmarks.methods_page import PAGE, write_page
from benchmarks.ours import Place, placed
from benchmarks.pieces import Piece, key_of, run_pieces
from benchmarks.settings import say, stop_like_ctrl_c
from tunewright.cli import comparing
from tunewright.cli.commands.demo import MODEL, SETTINGS, trained_run
from tunewright.core.durable import sha256_file
from tunewright.data.demo import HELDOUT, TRAIN
from tunewright.engine.client import EngineSession, Reply
from tunewright.evals.compare import TOGETHER, Variant, measure

RESULTS = Path(__file__).parent / "results" / "untuned"
BASELINES = "baselines"
ASKED = comparing.Asked(
    model=None, tuned=None, train=None, heldout=None, documents=[], instruction=None, k=4, seeds=3, rows=None,
    max_tokens=64, encoder="all-minilm-l6-v2",
)  # fmt: skip
# the code that says what is asked and what counts as right
CODE = ("evals.compare", "evals.rows", "evals.task")


def pieces(place: Place, what: comparing.Comparison, engine: EngineSession, console: Console) -> Iterator[Piece]:
    """The baselines, every variant without training, the tuned model."""
    key = key_of(
        [asdict(ASKED), SETTINGS, what.model, sha256_file(TRAIN), sha256_file(HELDOUT)],
        [Path(str(import_module(f"tunewright.{name}").__file__)) for name in CODE],
    )
    about = {"model": what.model, "n_rows": len(what.heldout), "threads": place.threads, "together": TOGETHER}

    def piece(name: str, run: Callable[[], dict[str, Any]]) -> Piece:
        path = RESULTS / f"{name.replace(', ', '-').replace(' ', '_')}.json"
        return Piece(name, path, key, lambda: {**about, "machine": machine(place.threads), **run()})

    yield piece(BASELINES, lambda: {"cards": {c.name: c.outcomes for c in comparing.simple_cards(what)}})
    for variant in comparing.make_variants(place.home, what, ASKED, place.work, console):
        name = f"{variant.system}, {variant.name}" if variant.name else variant.system
        yield piece(name, partial(answer, engine, what, variant))
    yield piece(comparing.TUNED, partial(answer_tuned, place, what, engine, console))


def answer(engine: EngineSession, what: comparing.Comparison, variant: Variant) -> dict[str, Any]:
    """What a variant's answers are worth and cost."""
    *_, found = measure(engine, what.task, variant, what.heldout, ASKED.max_tokens)
    assert not isinstance(found, Reply)
    return {
        "system": variant.system,
        "name": variant.name,
        "prompt_tokens": found.prompt_tokens,
        "completion_tokens": found.completion_tokens,
        "seconds": found.seconds,
        "outcomes": found.card.outcomes,
        "answers": found.answers,
    }


def answer_tuned(place: Place, what: comparing.Comparison, engine: EngineSession, console: Console) -> dict[str, Any]:
    """The same of the demo's model, trained first."""
    run = trained_run(place.home, keep=True, console=console)
    end = run.end()
    assert end is not None
    answered = answer(engine, what, Variant(comparing.TUNED, "", artefact=run.result))
    return {**answered, "training_seconds": end.data["seconds"]}


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=None, help="CPU threads that answer (all cores)")
    p.set_defaults(model=MODEL, dtype="auto")
    args = p.parse_args(argv)
    stop_like_ctrl_c()
    with placed(args) as place, EngineSession(place.home, place.threads) as engine:
        console = Console(stderr=True)
        what = comparing.prepare(place.home, ASKED)
        try:
            failed = run_pieces(pieces(place, what, engine, console), tell)
        except KeyboardInterrupt:
            say("Stopped. What was measured is kept; the same command goes on.")
            return 130
    write_page()
    say(f"{PAGE} is written.")
    return 1 if failed else 0


def tell(found: dict[str, Any]) -> str:
    if "seconds" not in found:
        return "done"
    right = ", ".join(f"{name} {sum(o) / len(o):.0%}" for name, o in found["outcomes"].items())
    return f"{right}; {found['seconds']:.2f} s an answer"


if __name__ == "__main__":
    sys.exit(main())
