"""What the loop does when a step fails: half the micro-batch when memory runs out, one step or many back when the
numbers are lost.

Whatever is decided is written to plan.json with its step before the work goes on, so a later attempt obeys it and a
resumed job gives the same numbers.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from tunewright.core.durable import discard
from tunewright.core.errors import Diverged, OutOfMemory, RollBack, is_out_of_memory
from tunewright.core.events import EventWriter
from tunewright.core.example import Group
from tunewright.core.run import Run
from tunewright.ops.packing import pack
from tunewright.train import meter
from tunewright.train.checkpoint import State, list_checkpoints
from tunewright.train.plan import Plan, Where, micro_tokens

MAX_SKIPPED = 3
MAX_ROLLBACKS = 2
LR_FACTOR = 0.5
SHOWN_ROWS = 50
T = TypeVar("T")


def with_room(
    run: Run,
    plan: Plan,
    events: EventWriter,
    step: int,
    where: Where,
    groups: Sequence[Group],
    compute: Callable[[int], T],
    virtual: int = 0,
) -> T:
    """compute(micro_batch_tokens); when memory runs out, again with half of it, until one group is a micro-batch.

    compute: does the whole work from its beginning, each time. groups: what it works on; virtual: tokens in front
    of each of their examples.
    Raises OutOfMemory with the numbers when halving cannot help any more.
    """
    while True:
        tokens = micro_tokens(plan, step, where)
        try:
            return compute(tokens)
        except (MemoryError, RuntimeError) as e:
            if not is_out_of_memory(e):
                raise
        # outside the except block, where the error no longer holds the frames with their tensors
        gc.collect()
        meter.release()
        _halve(run, plan, events, step, where, groups, tokens, virtual)


def _halve(
    run: Run,
    plan: Plan,
    events: EventWriter,
    step: int,
    where: Where,
    groups: Sequence[Group],
    tokens: int,
    virtual: int,
) -> None:
    batches = pack(list(groups), tokens, virtual)
    largest = max(b.n_tokens + virtual * b.n_segments for b in batches)
    doing = "validation" if where == "valid" else "training"
    if len(batches) == len(groups):
        raise OutOfMemory(
            f"Memory ran out in step {step} ({doing}) although each micro-batch holds only one row (the largest has "
            f"{largest} tokens; the job holds {meter.resident() / 1e9:.2f} GB, {meter.free() / 1e9:.2f} GB are free). "
            "Lower max_length (with overlong: truncate or drop), set checkpointing to 'full', use the tuner 'lora' "
            "with a smaller r, or end other programs; then start the job again."
        )
    half = max(1, min(tokens, largest) // 2)
    plan.halvings.append({"step": step, "where": where, "micro_batch_tokens": half})
    run.write_plan(plan.to_json())
    events.write(
        "message",
        f"Memory ran out in step {step} ({doing}); it is done again in micro-batches of {half} tokens instead of "
        f"{tokens}. The result is the same, a step takes longer.",
        {"step": step, "micro_batch_tokens": half},
        "warn",
    )


def skip(run: Run, plan: Plan, events: EventWriter, state: State, step: int, rows: list[int]) -> None:
    """An update whose loss or gradient is not finite is left out; after MAX_SKIPPED in a row the job rolls back."""
    state.skipped += 1
    state.bad_rows = sorted({*state.bad_rows, *rows})
    if state.skipped >= MAX_SKIPPED:
        why = f"loss or gradient was not finite in {state.skipped} steps in a row"
        roll_back(run, plan, events, step - state.skipped + 1, step, why, state.bad_rows)
    text = f"Step {step} was skipped: its loss or gradient is not finite. Rows: {row_list(rows)}."
    events.write("message", text, {"step": step, "rows": rows[:SHOWN_ROWS]}, "warn")


def roll_back(run: Run, plan: Plan, events: EventWriter, first: int, step: int, why: str, rows: list[int]) -> NoReturn:
    """Go back to the newest checkpoint from before step `first` (each is used once), with half the learning rate.

    Raises RollBack once that is in plan.json, or Diverged after MAX_ROLLBACKS of them.
    """
    if len(plan.rollbacks) >= MAX_ROLLBACKS:
        raise Diverged(
            f"Training diverged: {why}, the last being step {step}, again after {MAX_ROLLBACKS} roll-backs and with a "
            f"learning rate of {plan.learning_rate * LR_FACTOR**MAX_ROLLBACKS:g}. These steps had the rows "
            f"{row_list(rows)}. Look at them, or lower the learning rate (it was {plan.learning_rate:g})."
        )
    used = {r["to"] for r in plan.rollbacks}
    to = max((s for s in list_checkpoints(run) if s < first and s not in used), default=0)
    for newer in [s for s in list_checkpoints(run) if s > to]:
        discard(run.checkpoint(newer))
    # a crash before the next line leaves a job that resumes at `to`, fails in the same steps and rolls back then
    plan.rollbacks.append({"step": step, "to": to, "lr_factor": LR_FACTOR, "why": why, "rows": rows[:SHOWN_ROWS]})
    run.write_plan(plan.to_json())
    where = f"step {to}" if to else "the start"
    text = f"Rolling back to {where} with half the learning rate, because {why} (step {step}, rows {row_list(rows)})."
    events.write("message", text, {"step": step, "to": to, "rows": rows[:SHOWN_ROWS]}, "warn")
    raise RollBack(text)


def row_list(rows: list[int]) -> str:
    """`[3, 8]`, shortened when there are many."""
    more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    return f"{rows[:SHOWN_ROWS]}{more}"
