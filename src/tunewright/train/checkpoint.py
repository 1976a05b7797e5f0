"""Checkpoints: everything a run needs to go on exactly where it was. safetensors and JSON only, committed atomically.

checkpoints/step-000030/
  artefact/               what the engine serves (the tuner's files, tokenizer, artefact.json)
  optimizer.safetensors   '<parameter>|<slot>' -> tensor
  trainer.json            the loop's State and the tuner's own state
  tuner.safetensors       the tuner's own tensors, if it has any (AdaLoRA's scores)
  MANIFEST.json           size and sha256 of each file
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tunewright.core.durable import check_folder, commit_folder, discard, read_json, sweep, write_json
from tunewright.core.errors import CheckpointError
from tunewright.core.events import EventWriter
from tunewright.core.run import Run
from tunewright.train.optim.state import load_optimizer_state, optimizer_state
from tunewright.tuners.base import Tuner


@dataclass
class State:
    """Where the loop is, besides weights and optimizer. Data order and RNG follow from (seed, step), so this is all.

    step, epoch: finished ones. tokens: processed so far; supervised: those of them with a loss.
    best: {"step", "value"} of the early-stop metric; bad_epochs: epochs since. skipped: updates skipped in a row.
    loss_scale, well_scaled: factor on the loss in float16 and the steps since it last changed (train/scaling.py).
    last: metrics of the newest step. seconds: training time over all attempts.
    bad_rows: rows of the skipped steps in a row. history, streaks: of the divergence watch (train/watch.py).
    epochs: {"step", "train_loss", "valid_loss"} of each; loss_sum, loss_steps: of the present one. alarms: see advise.
    """

    step: int = 0
    epoch: int = 0
    tokens: int = 0
    supervised: int = 0
    best: dict[str, Any] | None = None
    bad_epochs: int = 0
    skipped: int = 0
    loss_scale: float = 1.0
    well_scaled: int = 0
    stopped_early: bool = False
    seconds: float = 0.0
    last: dict[str, Any] = field(default_factory=dict)
    bad_rows: list[int] = field(default_factory=list)
    history: dict[str, list[float]] = field(default_factory=dict)
    streaks: dict[str, int] = field(default_factory=dict)
    alarms: int = 0
    epochs: list[dict[str, Any]] = field(default_factory=list)
    loss_sum: float = 0.0
    loss_steps: int = 0


def save_checkpoint(
    run: Run,
    state: State,
    kind: str,
    tuner: Tuner,
    optimizer: torch.optim.Optimizer,
    write_artefact: Callable[[Path], None],
) -> Path:
    """Commit checkpoints/step-N. kind: `epoch` or `recovery`. Raises DiskFull; nothing earlier is touched."""
    names = {id(p): n for n, p in tuner.trainable().items()}

    def fill(folder: Path) -> None:
        write_artefact(folder / "artefact")
        save_file(optimizer_state(optimizer, names), folder / "optimizer.safetensors")
        if tensors := tuner.tensors():
            save_file(tensors, folder / "tuner.safetensors")
        write_json(folder / "trainer.json", {"kind": kind, "state": asdict(state), "tuner": tuner.state()})

    run.checkpoints.mkdir(exist_ok=True)
    return commit_folder(run.checkpoint(state.step), fill, {"step": state.step, "kind": kind})


def list_checkpoints(run: Run) -> list[int]:
    """Steps of the committed checkpoints, ascending (not checked)."""
    if not run.checkpoints.is_dir():
        return []
    names = [p.name.removeprefix("step-") for p in run.checkpoints.iterdir() if p.name.startswith("step-")]
    return sorted(int(n) for n in names if n.isdigit())


def checkpoint_kind(run: Run, step: int) -> str:
    return read_json(run.checkpoint(step) / "trainer.json")["kind"]


def load_newest(
    run: Run, tuner: Tuner, optimizer: torch.optim.Optimizer, events: EventWriter
) -> tuple[State, str | None]:
    """Restore the newest checkpoint that is whole; a damaged one is set aside with a warning event.

    Returns the state and the kind of the checkpoint, (State(), None) when there is none to start from.
    """
    sweep(run.checkpoints)
    for step in reversed(list_checkpoints(run)):
        folder = run.checkpoint(step)
        try:
            check_folder(folder)
            saved = read_json(folder / "trainer.json")
            tensors = load_file(folder / "optimizer.safetensors")
            tuner.load(folder / "artefact")
            tuner.load_state(saved["tuner"])
            own = folder / "tuner.safetensors"
            tuner.load_tensors(load_file(own) if own.exists() else {})
            load_optimizer_state(optimizer, tuner.trainable(), tensors)
        except (CheckpointError, OSError, ValueError, KeyError) as e:
            aside = folder.with_name(f"{folder.name}.damaged")
            if aside.exists():
                shutil.rmtree(aside)
            folder.rename(aside)
            events.write(
                "message",
                f"Checkpoint of step {step} is damaged and was set aside; using an older one. {e}",
                {},
                "warn",
            )
            continue
        return State(**saved["state"]), saved["kind"]
    return State(), None


def prune(run: Run, state: State, keep_epochs: int) -> list[int]:
    """Delete what is not needed any more; return the steps deleted.

    Kept: the newest two of any kind (the second is the fall-back of the first), the newest `keep_epochs` epoch
    checkpoints and the best one.
    """
    steps = list_checkpoints(run)
    epochs = [s for s in steps if checkpoint_kind(run, s) == "epoch"]
    keep = set(steps[-2:]) | set(epochs[-keep_epochs:])
    if state.best:
        keep.add(state.best["step"])
    gone = [s for s in steps if s not in keep]
    for step in gone:
        discard(run.checkpoint(step))
    return gone
