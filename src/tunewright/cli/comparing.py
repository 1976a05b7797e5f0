"""`tunewright recipe compare`: makes the recipes in a temporary folder, has all of them answer, prints the table."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from tunewright.cli.commands.chat import find_model
from tunewright.cli.demo_view import counter, percent_of, say
from tunewright.core.durable import write_json
from tunewright.core.errors import ModelNotFound, SpecError
from tunewright.core.home import Home
from tunewright.core.recipe import parse_recipe_spec
from tunewright.data.demo import HELDOUT, TRAIN
from tunewright.engine.client import EngineSession, Reply
from tunewright.engine.recipes.base import Source
from tunewright.evals.baselines import baseline_cards
from tunewright.evals.compare import TOGETHER, Line, Measured, Variant, conclusion, lines, measure, verdicts
from tunewright.evals.rows import Pair, Task, find_task, read_pairs
from tunewright.evals.task import Scorecard
from tunewright.jobs.recipes import build_recipe, sources_of
from tunewright.models.catalogue import resolve

BASE, PROMPT, SHOTS, SIMILAR, RETRIEVAL, TUNED = (
    "base",
    "prompt",
    "few-shot, random",
    "few-shot, similar",
    "retrieval",
    "tuned",
)
WIDE = 140
INSTRUCTION = "Read the user's message and sort it."
ROW_CHARS = 400  # of a passage of training rows: two or three of them


@dataclass(frozen=True)
class Asked:
    """The command's options; None is the demo's."""

    model: str | None
    tuned: str | None
    train: Path | None
    heldout: Path | None
    documents: list[str]
    instruction: str | None
    k: int
    seeds: int
    rows: int | None
    max_tokens: int
    encoder: str


@dataclass(frozen=True)
class Comparison:
    """What is compared: the task, its rows, and the model that may not need tuning."""

    model: str
    tuned: Path | None
    task: Task
    train: list[Pair]
    heldout: list[Pair]


def run(home: Home, asked: Asked, console: Console, json: Path | None) -> None:
    """Print the table, the verdicts and the conclusion. Raises SpecError, DataError, ModelNotFound."""
    what = prepare(home, asked)
    with tempfile.TemporaryDirectory(prefix="compare-", dir=home.cache) as place:
        variants = list(make_variants(home, what, asked, Path(place), console))
        measured = answer_all(home, what, variants, asked.max_tokens, console)
    baselines = simple_cards(what)
    say(console, f"\n{len(what.heldout)} held-out rows. Shares of right answers with 95 % intervals; [worst-best].")
    say(console, f"s/answer is the machine's time, {TOGETHER} answers computed at once; who asks alone waits longer.")
    wide = console if console.is_terminal else Console(width=WIDE)  # a file has no width to keep to
    wide.print(table(lines(measured), baselines, list(what.task.labels)))
    found = conclude(measured, baselines, what.task, console)
    if json is not None:
        write_json(json.absolute(), report(what, measured, baselines, found))


def prepare(home: Home, asked: Asked) -> Comparison:
    """Names and files settled, the task found."""
    from tunewright.cli.commands.demo import MODEL, demo_spec, earlier_runs
    from tunewright.evals.clinic import TASK

    if (asked.train is None) != (asked.heldout is None):
        raise SpecError("Give both --train and --heldout, or neither for the demo's data.")
    demo = asked.train is None
    train, heldout = read_pairs(asked.train or TRAIN), read_pairs(asked.heldout or HELDOUT)
    instruction = asked.instruction or (TASK.instruction if demo else INSTRUCTION)
    tuned: Path | None = None
    if asked.tuned is not None:
        tuned = Path(find_model(asked.tuned, home)["artefact"])
    elif demo and asked.model is None:
        done, _ = earlier_runs(home, demo_spec())
        tuned = None if done is None else done.result
    model = asked.model or (MODEL if demo else None)
    if model is None:
        raise SpecError("Give --model, the model that may not need tuning.", param="model")
    find_model(model, home)
    return Comparison(model, tuned, find_task([p.answer for p in train], instruction), train, heldout[: asked.rows])


def make_variants(home: Home, what: Comparison, asked: Asked, place: Path, console: Console) -> Iterator[Variant]:
    """Every system in the order of the table; recipes as folders below `place`."""

    def made(system: str, name: str, recipe: dict[str, Any], sources: Sequence[Source] = ()) -> Variant:
        folder = place / f"recipe-{len(list(place.iterdir()))}"
        spec = parse_recipe_spec({"recipe": recipe, "model": what.model})
        return Variant(system, name, artefact=build_recipe(home, folder, folder.name, spec, sources))

    yield Variant(BASE, "", **_where(home, what.model))
    prompts = what.task.prompts()
    for name, options in prompts.items():
        yield made(PROMPT, name, {"name": "prompt", **options})
    shots = {"name": "few_shot", "k": asked.k, "system": next(iter(prompts.values()))["system"]}
    examples = [_examples(what.train, place)]
    for seed in range(asked.seeds):
        yield made(SHOTS, f"seed {seed}", {**shots, "seed": seed}, examples)
    if _has_encoder(home, asked.encoder, console):
        yield made(SIMILAR, "", {**shots, "by": "similarity", "encoder": asked.encoder}, examples)
        look = {"name": "retrieval", "system": shots["system"], "encoder": asked.encoder}
        if asked.documents:
            yield made(RETRIEVAL, "", look, sources_of(asked.documents, Path.cwd()))
        else:
            yield made(RETRIEVAL, "", {**look, "passage_chars": ROW_CHARS}, [_as_document(what.train, place)])
    if what.tuned is not None:
        yield Variant(TUNED, "", artefact=what.tuned)


def _where(home: Home, model: str) -> dict[str, Any]:
    found = find_model(model, home)
    return {"base": found["base"]} if "base" in found else {"artefact": Path(found["artefact"])}


def _examples(train: Sequence[Pair], place: Path) -> Source:
    """The training rows as they were read, whatever their format."""
    import json

    path = place / "examples.jsonl"
    said = ({"messages": [*p.chat, {"role": "assistant", "content": p.answer}]} for p in train)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in said), encoding="utf-8")
    return Source(path.name, path)


def _as_document(train: Sequence[Pair], place: Path) -> Source:
    path = place / "training-rows.md"
    path.write_text("\n\n".join(f"{p.said}\n{p.answer}" for p in train), encoding="utf-8")
    return Source(path.name, path)


def _has_encoder(home: Home, name: str, console: Console) -> bool:
    try:
        resolve(name, home)
    except ModelNotFound as e:
        say(console, f"Without similar examples and retrieval: {e.message}")
        return False
    return True


def answer_all(
    home: Home, what: Comparison, variants: Sequence[Variant], max_tokens: int, console: Console
) -> list[Measured]:
    """Every variant answers every held-out row."""
    found: list[Measured] = []
    with (
        EngineSession(home) as engine,
        counter(console, "answers", len(variants) * len(what.heldout)) as tick,
    ):
        for variant in variants:
            for item in measure(engine, what.task, variant, what.heldout, max_tokens):
                if isinstance(item, Reply):
                    tick("", variant.system)
                else:
                    found.append(item)
    return found


def simple_cards(what: Comparison) -> list[Scorecard]:
    known = what.task.truths([p.answer for p in what.train])
    wanted = what.task.truths([p.answer for p in what.heldout])
    return baseline_cards([p.said for p in what.train], known, [p.said for p in what.heldout], wanted)


def table(found: Sequence[Line], baselines: Sequence[Scorecard], fields: Sequence[str]) -> Table:
    """A row a system: what it is worth, what an answer costs."""
    measures = [m for m in found[0].shares if m not in fields] + list(fields)
    out = Table("", *(m.replace("_", " ") for m in measures), "tokens in", "out", "s/answer", box=SIMPLE)
    for line in found:
        name = line.system if line.n_variants == 1 else f"{line.system} (x{line.n_variants})"
        cost = (f"{line.prompt_tokens:.0f}", f"{line.completion_tokens:.0f}", f"{line.seconds:.2f}")
        style = "bold" if line.system == TUNED else None
        out.add_row(name, *(_cell(line, m) for m in measures), *cost, style=style)
    for card in baselines:
        shown = (percent_of(i) if (i := card.share(m)) is not None else "-" for m in measures)
        out.add_row(card.name, *shown, "-", "-", "-")
    return out


def _cell(line: Line, measure: str) -> str:
    low, high = line.spread[measure]
    spread = "" if line.n_variants == 1 else rf" \[{100 * low:.0f}-{100 * high:.0f}]"
    return percent_of(line.shares[measure]) + spread


def conclude(measured: Sequence[Measured], baselines: Sequence[Scorecard], task: Task, console: Console) -> list[Any]:
    """The verdicts, printed."""
    tuned = next((m.card for m in measured if m.variant.system == TUNED), None)
    if tuned is None:
        say(console, "No tuned model was given: train one (`tunewright train`), then compare with --tuned NAME.")
        return []
    others = [*(m.card for m in measured if m.card is not tuned), *baselines]
    found = verdicts(tuned, others, task.labels)
    for verdict in found:
        say(console, str(verdict))
    say(console, conclusion(found))
    return found


def report(
    what: Comparison, measured: Sequence[Measured], baselines: Sequence[Scorecard], found: Sequence[Any]
) -> dict[str, Any]:
    """Everything as plain data."""
    from tunewright import __version__

    return {
        "tunewright": __version__,
        "model": what.model,
        "n_rows": len(what.heldout),
        "together": TOGETHER,
        "systems": [asdict(line) for line in lines(measured)],
        "baselines": {c.name: {m: asdict(i) for m in c.outcomes if (i := c.share(m)) is not None} for c in baselines},
        "verdicts": [asdict(v) for v in found],
        "variants": [
            {
                "system": m.variant.system,
                "name": m.variant.name,
                "prompt_tokens": m.prompt_tokens,
                "completion_tokens": m.completion_tokens,
                "seconds": m.seconds,
                "outcomes": m.card.outcomes,
                "answers": m.answers,
            }
            for m in measured
        ],
        "right": [p.answer for p in what.heldout],
    }
