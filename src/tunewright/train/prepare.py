"""Before step 1: a tuner that chooses what is trained by the data sees the gradients of some rows, one row at a time.

What it chose is kept in the run folder (`prepared/`), so that every later attempt trains the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from tunewright.core.durable import check_folder, commit_folder, discard
from tunewright.core.errors import CheckpointError, Interrupted
from tunewright.core.events import EventWriter
from tunewright.core.example import Group
from tunewright.core.run import Run
from tunewright.models.policy import Policy
from tunewright.objectives.base import Objective
from tunewright.ops.packing import collate
from tunewright.ops.types import Batch
from tunewright.train.shuffle import order
from tunewright.tuners.base import Tuner

TOLD_EVERY = 16  # rows


def prepare(
    run: Run,
    tuner: Tuner,
    policy: Policy,
    objective: Objective,
    groups: Sequence[Group],
    seed: int,
    events: EventWriter,
    stop: Callable[[], bool],
) -> None:
    """Let the tuner choose, or give it what an earlier attempt chose. Nothing for a tuner that looks at no data.

    Raises Interrupted when asked to stop meanwhile, Diverged if the gradients are not finite.
    """
    if not tuner.card.needs_data:
        return
    if is_kept(run.prepared, "choice of what is trained", events):
        tuner.load(run.prepared)
        return
    with one_row_at_a_time(policy):
        tuner.prepare(partial(row_gradients, policy, objective, groups, seed, events, stop))
    commit_folder(run.prepared, lambda folder: tuner.save(folder, run.job().base))


def row_gradients(
    policy: Policy,
    objective: Objective,
    groups: Sequence[Group],
    seed: int,
    events: EventWriter,
    stop: Callable[[], bool],
    n: int,
    *,
    doing: str = "Choosing what is trained",
    phase: str = "choosing",
    change: Callable[[Batch, int], Batch] | None = None,
) -> Iterator[None]:
    """At each of n groups (the first of epoch 0) add the gradient of its terms' coef * total, not divided by anything.

    Without noise, so it is a function of weights and data alone. change: makes another batch of a row's.
    """
    rows, started = order(seed, 0, len(groups))[:n].tolist(), time.monotonic()
    for i, row in enumerate(rows):
        if stop():
            raise Interrupted(f"Stopped before step 1 ({doing[:1].lower()}{doing[1:]}); nothing but this is lost.")
        if i % TOLD_EVERY == 0:
            left = (time.monotonic() - started) / i * (len(rows) - i) if i else None
            text = f"{doing}: {i} of {len(rows)} rows" + ("" if left is None else f", about {left:.0f} s left")
            events.write("phase", text, {"name": phase, "done": i, "total": len(rows), "seconds_left": left})
        batch = collate([groups[row]]).to(policy.device)
        terms = objective(policy, batch if change is None else change(batch, row))
        torch.stack([term.total * term.coef for term in terms.values() if term.coef]).sum().backward()
        yield


@contextmanager
def one_row_at_a_time(policy: Policy) -> Iterator[None]:
    """Every layer is recomputed within this: a row must fit before it is known what does."""
    policy.set_checkpointing("full")
    policy.model.train()
    yield
    policy.model.eval()
    policy.set_checkpointing("none")


def is_kept(folder: Path, what: str, events: EventWriter) -> bool:
    """Whether an earlier attempt left this. A damaged one is removed: the same is made again. what: for the message."""
    if not folder.exists():
        return False
    try:
        check_folder(folder)
    except CheckpointError as e:
        events.write("message", f"The {what} is damaged and is made again. {e}", {}, "warn")
        discard(folder)
        return False
    return True
