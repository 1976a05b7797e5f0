"""`tunewright demo`: train on the bundled data set, then show that and how much it helped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from tunewright.core.home import Home
    from tunewright.core.run import Run
    from tunewright.core.spec import JobSpec
    from tunewright.data.demo import ClinicRow
    from tunewright.evals.task import Scorecard

MODEL = "smollm2-135m-instruct"
MARK = "tunewright_demo"
# how they were chosen: data/demo/README.md; the fixed seed makes the demo the same wherever the arithmetic is
SETTINGS: dict[str, Any] = {
    "model": MODEL,
    "tuner": {"name": "lora", "r": 16},
    "n_epochs": 3,
    "batch_size": 8,
    "learning_rate": 1e-3,
    "seed": 7,
    "suffix": "clinic-demo",
    "decoding": {"temperature": 0.0},
}


def demo(
    home: Annotated[Path | None, typer.Option(help="The data folder.", show_default="~/.tunewright")] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the model of the last finished demo and only score it again.")
    ] = False,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write scores and all answers to FILE.")
    ] = None,
) -> None:
    """Fine-tune a small model in minutes and see what it learned.

    Needs no network, no account and no GPU. Ctrl-C loses nothing: run it again and it continues.
    """
    from rich.console import Console

    from tunewright.cli import demo_view
    from tunewright.core.home import find_home
    from tunewright.data.demo import HELDOUT, TRAIN, load

    console = Console()
    place = find_home(home).ensure()
    train, heldout = load(TRAIN), load(HELDOUT)
    demo_view.introduce(console, len(train), len(heldout), MODEL)
    run = trained_run(place, keep, console)
    answers, cards = evaluate(place, run, train, heldout, console)
    demo_view.show_results(console, heldout, answers, cards)
    demo_view.next_steps(console, place, run)
    if json is not None:
        write_report(json, run, heldout, answers, cards)


def trained_run(home: Home, keep: bool, console: Console) -> Run:
    """The run with the demo's model: an earlier one (`keep`), an unfinished one continued, or a new one.

    Raises typer.Exit with the worker's exit code when training did not finish.
    """
    from tunewright.cli.commands.train import exit_code, new_run
    from tunewright.cli.progress import run_foreground

    spec = demo_spec()
    done, unfinished = earlier_runs(home, spec)
    if keep and done is not None:
        console.print(f"Keeping the model of the earlier demo: {done.job().name}", markup=False, highlight=False)
        return done
    if unfinished is not None:
        console.print(f"Continuing the demo that was interrupted ({unfinished.id}).", markup=False, highlight=False)
    run = unfinished or new_run(home, spec, console)
    end = run_foreground(home, run, console)
    if end.data.get("status") != "succeeded":
        if end.data.get("status") != "failed":
            console.print("`tunewright demo` continues it too, and then shows the scores.", highlight=False)
        raise typer.Exit(exit_code(end.data))
    return run


def demo_spec() -> JobSpec:
    """The demo's job. Its metadata carries a hash of data and settings: a run with another hash is not continued."""
    import hashlib
    import json

    from tunewright import __version__
    from tunewright.core.durable import sha256_file
    from tunewright.core.spec import parse_spec
    from tunewright.data.demo import TRAIN

    what = json.dumps([__version__, sha256_file(TRAIN), SETTINGS], sort_keys=True)
    mark = hashlib.sha256(what.encode()).hexdigest()[:16]
    return parse_spec({**SETTINGS, "training_file": str(TRAIN), "metadata": {MARK: mark}})


def earlier_runs(home: Home, spec: JobSpec) -> tuple[Run | None, Run | None]:
    """(the newest finished run of exactly this demo, the newest one that can be continued); None where there is none.

    Only the newest run counts as unfinished, so that an old torso is not revived after a finished demo.
    """
    from tunewright.core.run import ARTEFACT, list_runs

    runs = [r for r in list_runs(home) if (r.job().spec.metadata or {}).get(MARK) == (spec.metadata or {})[MARK]]
    done = [r for r in runs if (r.result / ARTEFACT).is_file()]
    last = runs[-1] if runs and runs[-1] not in done else None
    end = last.end() if last is not None else None
    failed = end is not None and end.data.get("status") == "failed"
    return (done[-1] if done else None), (None if failed else last)


def evaluate(
    home: Home, run: Run, train: Sequence[ClinicRow], heldout: Sequence[ClinicRow], console: Console
) -> tuple[dict[str, list[str]], list[Scorecard]]:
    """(system -> its answers, all scorecards): every system answers every held-out row, greedily."""
    from tunewright.cli import demo_view
    from tunewright.engine.client import EngineSession
    from tunewright.evals import clinic

    sources: dict[str, dict[str, Any]] = {
        clinic.BASE: {"base": run.job().base},
        clinic.FEW_SHOT: {"base": run.job().base},
        clinic.TUNED: {"artefact": run.result},
    }
    answers: dict[str, list[str]] = {}
    try:
        with EngineSession(home) as engine, demo_view.counter(console, "answers", len(sources) * len(heldout)) as tick:
            for system, source in sources.items():
                replies = clinic.ask(engine, clinic.prompts(system, train, heldout), **source)
                answers[system] = [tick(reply, system) for reply in replies]
    except KeyboardInterrupt:
        console.print("Stopped. The model is trained and kept; `tunewright demo --keep` goes on with the scores.")
        raise typer.Exit(130) from None
    cards = [clinic.score(system, said, heldout) for system, said in answers.items()]
    return answers, [*cards, *clinic.baselines(train, heldout)]


def write_report(
    path: Path, run: Run, heldout: Sequence[ClinicRow], answers: dict[str, list[str]], cards: Sequence[Scorecard]
) -> None:
    """Scores, verdicts and every answer as JSON."""
    from dataclasses import asdict

    from tunewright import __version__
    from tunewright.core.durable import write_json
    from tunewright.evals.clinic import TUNED
    from tunewright.evals.task import VALID
    from tunewright.evals.verdict import judge

    system = next(c for c in cards if c.name == TUNED)
    rivals = [c for c in cards if c is not system]
    systems = {c.name: {m: asdict(i) for m in c.outcomes if (i := c.share(m)) is not None} for c in cards}
    rows = [
        {
            "message": row.message,
            "truth": {"department": row.department, "urgency": row.urgency, "reason": row.reason},
            "answers": {name: said[i] for name, said in answers.items()},
        }
        for i, row in enumerate(heldout)
    ]
    verdicts = {m: asdict(judge(system, rivals, m)) for m in system.outcomes if m != VALID}
    job = run.job()
    start, end = run.events()[0], run.end()
    write_json(
        path.absolute(),
        {
            "tunewright": __version__,
            "model": job.name,
            "base": job.base,
            "result": str(run.result),
            "spec": job.spec.model_dump(mode="json"),
            "training_seconds": None if end is None else end.time - start.time,
            "plan": run.plan(),
            "systems": systems,
            "verdicts": verdicts,
            "rows": rows,
        },
    )
