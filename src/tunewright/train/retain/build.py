"""From the spec's `retain` to methods that are ready for step 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tunewright.core.errors import SpecError
from tunewright.core.events import EventWriter
from tunewright.core.example import Group
from tunewright.core.run import JobFile, Run
from tunewright.core.spec import HEADS, JobSpec
from tunewright.models.policy import Policy
from tunewright.objectives import OBJECTIVES
from tunewright.train.plan import Plan
from tunewright.train.reference import Reference
from tunewright.train.retain import RETAIN
from tunewright.train.retain.base import Given, Retain
from tunewright.tuners.base import Tuner, TunerCard

FLOAT = 4  # bytes


def methods(spec: JobSpec) -> list[Retain]:
    """The job's methods, not begun. The second one of a kind is called `replay_2` in the events."""
    seen: Counter[str] = Counter()
    found = []
    for part in spec.retain:
        entry = RETAIN.load(part.name)
        seen[part.name] += 1
        again = f"_{seen[part.name]}" if seen[part.name] > 1 else ""
        found.append(entry(entry.Options(**part.options), f"{part.name}{again}"))
    return found


def begin(
    run: Run,
    job: JobFile,
    spec: JobSpec,
    plan: Plan,
    tuner: Tuner,
    policy: Policy,
    load: Callable[[str], Sequence[Group]],
    reference: Callable[[], Reference],
    events: EventWriter,
    stop: Callable[[], bool],
) -> list[Retain]:
    """The job's methods, begun. load: the rows of a role. reference: makes the policy at step 0, if one needs it.

    Raises SpecError for retained rows that are empty, DataError, Interrupted, Diverged.
    """
    found = methods(spec)
    objective: Any = OBJECTIVES.load(HEADS[spec.head])
    objective = objective(objective.Options())
    compared = reference() if any(m.card.needs_reference for m in found) else None
    for i, method in enumerate(found, 1):
        role = f"retain-{i}"
        rows = load(role) if role in job.more else ()
        if role in job.more and not len(rows):
            name = job.sources[role]["name"]
            raise SpecError(
                f"retain '{spec.retain[i - 1].name}': no row of {name} is left to learn from.", param="retain"
            )
        method.begin(
            Given(
                seed=plan.seed,
                batch_size=plan.batch_size,
                tuner=tuner,
                policy=policy,
                objective=objective,
                rows=rows,
                reference=compared,
                folder=run.retained / method.key,
                events=events,
                stop=stop,
            )
        )
    return found


def extra_bytes(spec: JobSpec, card: TunerCard, itemsize: int, continues: bool) -> int:
    """Bytes for each parameter of the model that the job will hold beside it: the methods' copies of what is trained,
    and the policy at step 0 where a method or the objective needs it and it is a second model. continues: the job
    starts from an adapter or delta."""
    found = methods(spec)
    whole = card.artefact == "weights"
    copies = FLOAT * sum(m.card.copies for m in found) if whole else 0
    compared = [*(m.card for m in found), OBJECTIVES.load(spec.objective.name).card]
    second = any(c.needs_reference for c in compared) and (card.artefact != "adapter" or continues)
    return copies + ((FLOAT if card.float32_base else itemsize) if second else 0)
