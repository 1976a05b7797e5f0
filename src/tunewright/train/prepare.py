"""Before step 1: a tuner that chooses what is trained by the data sees the gradients of some rows, one row at a time.

What it chose is kept in the run folder (`prepared/`), so that every later attempt trains the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from tunewright.core.durable import check_folder, commit_folder, discard
from tunewright.core.errors import CheckpointError, Interrupted
from tunewright.core.events import EventWriter
from tunewright.core.example import Group
from tunewright.core.run import Run
from tunewright.models.policy import Policy
from tunewright.objectives.base import Objective
from tunewright.ops.packing import collate
from tunewright.train.plan import order
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
    if _is_kept(run, events):
        tuner.load(run.prepared)
        return
    # one row at a time and every layer recomputed: this must fit before it is known what does
    policy.set_checkpointing("full")
    policy.model.train()
    tuner.prepare(partial(row_gradients, policy, objective, groups, seed, events, stop))
    policy.model.eval()
    policy.set_checkpointing("none")
    commit_folder(run.prepared, lambda folder: tuner.save(folder, run.job().base))


def row_gradients(
    policy: Policy,
    objective: Objective,
    groups: Sequence[Group],
    seed: int,
    events: EventWriter,
    stop: Callable[[], bool],
    n: int,
) -> Iterator[None]:
    """At each of n groups (the first of epoch 0) add the gradient of its terms' coef * total, not divided by anything.

    Without noise, so it is a function of weights and data alone.
    """
    rows = order(seed, 0, len(groups))[:n].tolist()
    for i, row in enumerate(rows):
        if stop():
            raise Interrupted("Stopped before step 1, while choosing what is trained; nothing is lost but this choice.")
        if i % TOLD_EVERY == 0:
            text = f"Choosing what is trained: {i} of {len(rows)} rows"
            events.write("phase", text, {"name": "choosing", "done": i, "total": len(rows)})
        terms = objective(policy, collate([groups[row]]).to(policy.device))
        torch.stack([term.total * term.coef for term in terms.values() if term.coef]).sum().backward()
        yield


def _is_kept(run: Run, events: EventWriter) -> bool:
    """Whether an earlier attempt left its choice. A damaged one is removed: the same choice is made again."""
    if not run.prepared.exists():
        return False
    try:
        check_folder(run.prepared)
    except CheckpointError as e:
        events.write("message", f"The choice of what is trained is damaged and is made again. {e}", {}, "warn")
        discard(run.prepared)
        return False
    return True
