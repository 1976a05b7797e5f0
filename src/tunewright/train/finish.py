"""What a job leaves: an artefact to serve in each checkpoint, result/ proved readable, OpenAI's table of the steps."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from tunewright.core.durable import check_folder, commit_folder, disk_full_is_clear, write_json
from tunewright.core.errors import Diverged, SpecError
from tunewright.core.run import ARTEFACT, Artefact, JobFile, Run
from tunewright.core.spec import JobSpec
from tunewright.data.tokenizer import TOKENIZER_FILES
from tunewright.models.heads import Head
from tunewright.train.checkpoint import State, list_checkpoints
from tunewright.train.loop import Parts
from tunewright.tuners.base import Tuner

CSV_HEADER = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


@dataclass(frozen=True)
class Start:
    """What the job starts from. weights: the model folder. over: an adapter or delta over it to continue, or None;
    record: what it is."""

    weights: Path
    over: Path | None
    base: str
    record: Artefact | None = None


def artefact_writer(
    job: JobFile, spec: JobSpec, tuner: Tuner, start: Start, head: Head | None, quantization: str
) -> Callable[[Path, State], None]:
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
            head=spec.head,
            labels=None if head is None else list(head.labels),
            quantization=quantization,
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
    """OpenAI's result file: one row a step, empty cells where nothing was validated.

    What else the objective measures (margins …) has columns after OpenAI's five.
    """
    tmp = run.metrics_csv.with_name(f"{run.metrics_csv.name}.tmp-new")
    more = further_columns(run)
    with disk_full_is_clear(run.metrics_csv.name), open(tmp, "w", newline="") as f:
        rows = csv.writer(f, lineterminator="\n")
        rows.writerow((*CSV_HEADER, *more))
        for event in run.stream():
            if event.type == "metrics":
                d = event.data
                values = (d["step"], d["train_loss"], d["train_mean_token_accuracy"])
                others = (d.get(name, "") for name in ("valid_loss", "valid_mean_token_accuracy", *more))
                rows.writerow([*values, *others])
    tmp.replace(run.metrics_csv)


def further_columns(run: Run) -> list[str]:
    """Metrics of a step's own rows and of validation batches that OpenAI's table has no column for, as they came."""
    known = {*CSV_HEADER, "train_mean_token_accuracy"}
    names = dict.fromkeys(k for e in run.stream() if e.type == "metrics" for k in e.data)
    return [name for name in names if name.startswith(("train_", "valid_")) and name not in known]
