"""From a job file to a result folder: the one place where parts are put together.

spec -> model, tokenizer, groups -> tuner, objective, optimizer -> plan -> loop -> result/
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from tunewright.core.conversation import Conversation
from tunewright.core.durable import check_folder, commit_folder, sweep, write_json
from tunewright.core.errors import Diverged, SpecError
from tunewright.core.events import EventWriter
from tunewright.core.example import Group
from tunewright.core.home import Home
from tunewright.core.run import ARTEFACT, BASE_IS_START, Artefact, JobFile, Run, read_artefact
from tunewright.core.spec import JobSpec, check_parts
from tunewright.data.render import RenderReport, render_rows
from tunewright.data.tokenizer import TOKENIZER_FILES, Tokenizer
from tunewright.data.validate import check_file, raise_for, read_conversations
from tunewright.models.loader import load_model, materialise
from tunewright.models.policy import Policy
from tunewright.objectives import OBJECTIVES
from tunewright.ops.runtime import be_deterministic, choose_dtype, device, set_threads
from tunewright.train.checkpoint import State, list_checkpoints, load_newest
from tunewright.train.describe import describe
from tunewright.train.loop import Parts, announce_checkpoint, train
from tunewright.train.optim import OPTIMIZERS, SCHEDULES
from tunewright.train.plan import Plan, resolve
from tunewright.train.preflight import peak_bytes, preflight
from tunewright.tuners import TUNERS
from tunewright.tuners.base import Tuner
from tunewright.tuners.lora import merge_adapter

CSV_HEADER = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


@dataclass(frozen=True)
class Start:
    """What the job starts from. weights: the model folder; adapter: an adapter to continue, or None."""

    weights: Path
    adapter: Path | None
    base: str


def run_job(run: Run, home: Home, events: EventWriter, stop: Callable[[], bool]) -> dict[str, Any]:
    """Run or continue the job in `run` to its end; returns the data of the `end` event.

    Raises a TunewrightError that says what went wrong; Interrupted when `stop` became true (a checkpoint was saved).
    """
    job = run.job()
    spec = check_parts(job.spec, describe())
    saved = run.plan()
    earlier = None if saved is None else Plan(**saved)
    threads = set_threads(earlier.threads if earlier else spec.threads)
    dtype = choose_dtype(earlier.dtype if earlier else spec.dtype)
    be_deterministic()
    start = find_start(run, job, home, events)
    tokenizer = Tokenizer.load(start.weights, now=datetime.fromtimestamp(job.created_at))
    objective = part(OBJECTIVES, spec.objective)
    context = context_length(start.weights)
    limit = context if spec.max_length == "auto" else min(spec.max_length, context)
    groups = load_groups(run.folder / job.train, job, spec, tokenizer, objective, limit, "train", events)
    valid: list[Group] = []
    if job.validation:
        valid = load_groups(run.folder / job.validation, job, spec, tokenizer, objective, limit, "validation", events)

    tuner: Tuner = part(TUNERS, spec.tuner)
    events.write("phase", "Loading the model", {"name": "loading", "done": 0, "total": 1})
    model = attach(start, tuner, spec, dtype)
    policy = Policy(model, autocast=None if dtype == torch.float32 else dtype)
    if earlier is not None:
        plan = keep(earlier, events)
    else:
        plan = decide(run, spec, groups, valid, tuner, objective, policy, dtype, threads, context, events)
    optimizer_class, optimizer_options = row(OPTIMIZERS, spec.optimizer)
    optimizer = optimizer_class.build(tuner.trainable(), plan.learning_rate, optimizer_options)
    schedule, schedule_options = row(SCHEDULES, spec.schedule)
    parts = Parts(
        run=run,
        spec=spec,
        plan=plan,
        policy=policy,
        tuner=tuner,
        objective=objective,
        optimizer=optimizer,
        rate=lambda step: plan.learning_rate * schedule.factor(step, plan.total_steps, schedule_options),
        groups=groups,
        valid=valid,
        events=events,
        write_artefact=artefact_writer(job, spec, tuner, start),
        stop=stop,
    )
    state = resume(parts)
    if events.attempt == 1:
        events.write("message", "Fine-tuning job started")
    state = train(parts, state)
    finish(parts, state)
    return {
        "status": "succeeded",
        "trained_tokens": state.tokens,
        "steps": state.step,
        "metrics": state.last,
        "seconds": state.seconds,
        "predicted_seconds": plan.predicted_seconds,
        "peak_memory_bytes": peak_bytes(),
        "predicted_peak_memory_bytes": plan.peak_memory_bytes,
    }


def row(table: Any, chosen: Any) -> tuple[Any, Any]:
    """(the table's entry, its validated options)."""
    entry = table.load(chosen.name)
    return entry, entry.Options(**chosen.options)


def part(table: Any, chosen: Any) -> Any:
    """An instance of the table's entry with its options."""
    entry, options = row(table, chosen)
    return entry(options)


def find_start(run: Run, job: JobFile, home: Home, events: EventWriter) -> Start:
    """Where the weights come from: the base model, or the artefact that the job continues from."""
    artefact = read_artefact(run.folder / job.start) if job.start else None
    if job.start and artefact and artefact.kind == "weights":
        return Start(run.folder / job.start, None, BASE_IS_START)
    events.write("phase", f"Preparing the base model {job.base}", {"name": "base", "done": 0, "total": 1})
    adapter = run.folder / job.start if job.start else None
    return Start(materialise(job.base, home), adapter, job.base)


def context_length(folder: Path) -> int:
    """Tokens that the model can attend to, from its config."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return int(getattr(config, "max_position_embeddings", None) or 1 << 20)


def load_groups(
    path: Path,
    job: JobFile,
    spec: JobSpec,
    tokenizer: Tokenizer,
    objective: Any,
    limit: int,
    role: str,
    events: EventWriter,
) -> list[Group]:
    """Check a data file and render it to token ids. role: `train` or `validation`. Raises DataError."""
    what = {"train": "training", "validation": "validation"}[role]
    name = job.sources.get(role, {}).get("name", path.name)
    minimum = spec.min_examples if role == "train" else 1
    shapes = objective.card.shapes
    report = check_file(path, format=spec.format, purpose_shapes=shapes, min_examples=minimum, name=name)
    raise_for(report, what=what)
    events.write("message", f"The {what} file {name} has {report.n_rows} rows. {report.reason}")
    rendered = RenderReport()
    groups = list(
        render_rows(
            with_progress(read_conversations(path, report.format, name), report.n_rows, what, events),
            tokenizer,
            report=rendered,
            shape=report.shape,
            train_on=spec.train_on,
            max_length=limit,
            overlong=spec.overlong,
        )
    )
    for note in rendered.notes:
        events.write("message", f"{what.capitalize()} file: {note}", {}, "warn")
    return groups


def with_progress(rows: Iterator[Conversation], total: int, what: str, events: EventWriter) -> Iterator[Conversation]:
    """Pass rows on, with a `phase` event for each twentieth of them."""
    every = max(1, total // 20)
    for i, item in enumerate(rows):
        if i % every == 0:
            events.write(
                "phase", f"Rendering the {what} file", {"name": f"rendering {what}", "done": i, "total": total}
            )
        yield item


def attach(start: Start, tuner: Tuner, spec: JobSpec, dtype: torch.dtype) -> nn.Module:
    """Load the weights and make them trainable."""
    whole = tuner.card.artefact == "weights"
    model = load_model(start.weights, torch.float32 if tuner.card.float32_base else dtype).to(device())
    if start.adapter is not None and whole:
        model = merge_adapter(model, start.adapter)
    model = tuner.attach(model, seed=spec.seed or 0)
    if start.adapter is not None and not whole:
        tuner.load(start.adapter)
    return model


def decide(
    run: Run,
    spec: JobSpec,
    groups: Sequence[Group],
    valid: Sequence[Group],
    tuner: Tuner,
    objective: Any,
    policy: Policy,
    dtype: torch.dtype,
    threads: int,
    context: int,
    events: EventWriter,
) -> Plan:
    """Settle every `auto`, measure, write plan.json and say what was decided."""
    plan = resolve(
        spec,
        groups,
        valid,
        tuner.card,
        dtype=str(dtype).removeprefix("torch."),
        threads=threads,
        context=context,
        parameters=sum(p.numel() for p in policy.model.parameters()),
        trainable=sum(p.numel() for p in tuner.trainable().values()),
        versions=versions(),
    )
    valid_tokens = sum(g.n_tokens for g in valid) * plan.n_epochs
    plan = replace(plan, **preflight(policy, objective, tuner, groups, valid_tokens, plan))
    run.write_plan(plan.to_json())
    events.write(
        "plan",
        f"{plan.n_rows} rows, {plan.total_steps} steps of {plan.batch_size}, {plan.n_epochs} epochs; "
        f"about {plan.predicted_seconds:.0f} s and {plan.peak_memory_bytes / 2**30:.1f} GiB",
        plan.to_json(),
    )
    return plan


def versions() -> dict[str, str]:
    """What the numbers of a run depend on besides its inputs."""
    return {name: version(name) for name in ("torch", "transformers", "peft", "tunewright")}


def keep(plan: Plan, events: EventWriter) -> Plan:
    """The plan of the earlier attempt, with a warning when the environment is not the one it was made in."""
    changed = [f"{k} {plan.versions.get(k)} -> {v}" for k, v in versions().items() if plan.versions.get(k) != v]
    if changed:
        text = f"This attempt runs with other versions ({', '.join(changed)}): it resumes, but perhaps not bit for bit."
        events.write("message", text, {}, "warn")
    return plan


def resume(parts: Parts) -> State:
    """Go back to the newest whole checkpoint and say so, or start at step 0."""
    sweep(parts.run.folder)
    state, kind = load_newest(parts.run, parts.tuner, parts.optimizer, parts.events)
    if parts.events.attempt > 1:
        where = f"step {state.step}" if state.step else "the start"
        parts.events.write(
            "resumed",
            f"Attempt {parts.events.attempt} goes on from {where}",
            {"step": state.step, "checkpoint": parts.run.checkpoint(state.step).name if state.step else None},
        )
    announced = {e.data["step"] for e in parts.run.events() if e.type == "checkpoint"}
    if kind is not None and state.step not in announced:
        # killed between the commit and its event
        announce_checkpoint(parts.events, state, kind)
    return state


def artefact_writer(job: JobFile, spec: JobSpec, tuner: Tuner, start: Start) -> Callable[[Path, State], None]:
    """A function that fills a folder with a servable artefact: weights, tokenizer, artefact.json."""

    def write(folder: Path, state: State) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tuner.save(folder, start.base)
        for name in TOKENIZER_FILES:
            if (start.weights / name).exists():
                shutil.copyfile(start.weights / name, folder / name)
        whole = tuner.card.artefact == "weights"
        artefact = Artefact(
            kind=tuner.card.artefact,
            name=job.name,
            base=None if whole else start.base,
            tuner=spec.tuner.model_dump(),
            step=state.step,
            decoding=spec.decoding,
            metrics={k: v for k, v in state.last.items() if v is not None},
        )
        write_json(folder / ARTEFACT, artefact.model_dump(mode="json"))

    return write


def finish(parts: Parts, state: State) -> None:
    """Write result/ and step_metrics.csv, then prove that the result can be read and holds only finite numbers."""
    wants_best = parts.spec.result == "best" or (parts.spec.result == "auto" and parts.spec.early_stopping is not None)
    chosen = state.best["step"] if wants_best and state.best else state.step
    if wants_best and not state.best:
        raise SpecError(
            f"result 'best' needs {parts.spec.early_stop_metric}, which needs a validation_file.",
            param="validation_file",
        )

    def fill(folder: Path) -> None:
        if chosen in list_checkpoints(parts.run):
            shutil.copytree(parts.run.checkpoint(chosen) / "artefact", folder, dirs_exist_ok=True)
        else:
            parts.write_artefact(folder, state)

    commit_folder(parts.run.result, fill, {"step": chosen})
    verify(parts.run.result)
    write_csv(parts.run)
    parts.events.write("message", f"New fine-tuned model created: {parts.run.job().name}", {"step": chosen})


def verify(folder: Path) -> None:
    """Check the manifest and that every tensor can be read and is finite. Raises CheckpointError or Diverged."""
    check_folder(folder)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as f:
            bad = [key for key in f.keys() if not torch.isfinite(f.get_tensor(key)).all()]  # noqa: SIM118
        if bad:
            raise Diverged(f"The trained weights hold values that are not finite: {', '.join(bad[:3])}.")


def write_csv(run: Run) -> None:
    """OpenAI's result file: one row a step, empty cells where nothing was validated."""
    tmp = run.metrics_csv.with_name(f"{run.metrics_csv.name}.tmp-new")
    with open(tmp, "w", newline="") as f:
        rows = csv.writer(f, lineterminator="\n")
        rows.writerow(CSV_HEADER)
        for event in run.events():
            if event.type == "metrics":
                d = event.data
                values = (d["step"], d["train_loss"], d["train_mean_token_accuracy"])
                rows.writerow([*values, d.get("valid_loss", ""), d.get("valid_mean_token_accuracy", "")])
    tmp.replace(run.metrics_csv)
