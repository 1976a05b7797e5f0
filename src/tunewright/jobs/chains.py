"""Chains under the supervisor: a row whose children are ordinary jobs, and which follows them.

The children's rows say how far the chain is (jobs/chain.py); the chain's own row only repeats it for people. A chain
that runs makes the next stage's job; asked to pause or to cancel, it asks the job that is under way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tunewright.core.errors import StateError, UserError
from tunewright.core.run import Run
from tunewright.core.spec import KINDS, JobSpec
from tunewright.jobs import exits
from tunewright.jobs.chain import Child, Next, attempts_of, child_id, create_stage, next_stage, stage_list
from tunewright.jobs.describe import load_describe
from tunewright.jobs.foreground import row_of
from tunewright.jobs.journal import Line
from tunewright.jobs.rows import WITH_WORKER, JobRow
from tunewright.jobs.store import Store

if TYPE_CHECKING:
    from tunewright.jobs.supervisor import Supervisor

FOLLOWED = WITH_WORKER | {"paused"}


def children(store: Store, chain_id: str, stages: Mapping[str, JobSpec]) -> dict[str, JobRow]:
    """The newest job of each stage that has one."""
    found = {}
    for stage in stages:
        n = _jobs_of(store, chain_id, stage)
        row = store.get_job(child_id(chain_id, stage, n)) if n else None
        if row is not None:
            found[stage] = row
    return found


def _jobs_of(store: Store, chain_id: str, stage: str) -> int:
    return attempts_of(chain_id, stage, lambda job_id: store.get_job(job_id) is not None)


def look(store: Store, chain: JobRow) -> tuple[Next, dict[str, JobRow]]:
    """What follows for the chain, and its jobs by stage."""
    stages = store.run(chain.id).job().stages
    made = children(store, chain.id, stages)
    return next_stage(stages, {k: Child(r.id, r.status, r.name, r.error) for k, r in made.items()}), made


def follow(boss: Supervisor, chain: JobRow) -> None:
    """One look at a chain that runs, is being stopped, or is paused: whatever follows now is done."""
    boss.store.catch_up(chain.id)  # what a terminal wrote
    todo, made = look(boss.store, chain)
    _show(boss.store, chain, made)
    if todo.what == "wait":
        _wait(boss, chain, todo, made[todo.stage])
    elif boss.launcher.alive(boss.store.run(chain.id)):
        return  # a terminal drives it
    elif chain.status == "cancelling":
        changes, say = exits.cancelled(boss.clock())
        boss.store.update_job(chain.id, {"cancelling"}, say=say, **changes)
    elif todo.what == "done":
        _succeeded(boss, chain, made)
    elif todo.what == "failed":
        _failed(boss, chain, todo)
    else:
        _start(boss, chain, todo)


def _start(boss: Supervisor, chain: JobRow, todo: Next) -> None:
    """Nothing runs: the next job is made, unless the chain is to rest here."""
    if chain.status == "paused":
        return
    if chain.status == "pausing":
        _pause(boss, chain, Line("Fine-tuning job paused"))
    elif chain.started_by == "foreground":
        _pause(boss, chain, Line("The chain was stopped in the terminal; it can be resumed."))
    else:
        try:
            make_stage(boss, chain, todo, attempt=1)
        except UserError as e:  # such as a model that somebody deleted meanwhile
            changes, say = exits.failed(
                e.code, f"{_title(chain, todo)} cannot begin. {e.message}", e.param, boss.clock()
            )
            boss.store.update_job(chain.id, {chain.status}, say=say, **changes)


def make_stage(boss: Supervisor, chain: JobRow, todo: Next, attempt: int) -> None:
    """Make the job of a stage and queue it. Doing it twice makes one job."""
    run = create_stage(boss.home, boss.store.run(chain.id), todo, attempt)
    text = f"{_title(chain, todo)} has begun: {run.id}"
    if not boss.store.has_event(chain.id, text):
        boss.store.add_event(chain.id, "info", text)
    boss.store.add_job(stage_row(chain, run, load_describe(boss.home)))


def stage_row(chain: JobRow, run: Run, describe: Mapping[str, Any]) -> JobRow:
    """The row of a stage's job, as a request for it alone would have made it."""
    row = row_of(run)
    kind = describe["objective"].get(row.spec["objective"]["name"], {}).get("card", {}).get("openai_method")
    parts = {name: row.spec[name] for name in KINDS}
    return replace(
        row,
        status="validating_files",
        attempt=0,
        started_by=chain.started_by,
        method=None if kind is None else {"type": kind, kind: {"hyperparameters": row.hyperparameters}},
        tunewright={**parts, **(row.tunewright or {})},
    )


def _wait(boss: Supervisor, chain: JobRow, todo: Next, child: JobRow) -> None:
    """A job is under way, or rests."""
    if chain.status == "cancelling":
        _cancel_child(boss, child)
    elif chain.status == "paused":
        if child.status != "paused":
            boss.store.update_job(chain.id, {"paused"}, status="running", error=None)
    elif child.status == "paused":
        why = f" {child.error['message']}" if child.error else ""
        _pause(boss, chain, Line(f"{_title(chain, todo)} is paused.{why}"), error=child.error)
    elif chain.status == "pausing":
        _pause_child(boss, child)
    else:
        finish = child.estimated_finish if todo.number == len(_stages(chain)) else None
        if finish != chain.estimated_finish:
            boss.store.update_job(chain.id, {"running"}, estimated_finish=finish)


def _pause_child(boss: Supervisor, child: JobRow) -> None:
    """One that is not in either status now is looked at again in the next tick."""
    if not boss.store.update_job(child.id, {"queued"}, status="paused"):
        boss.store.update_job(child.id, {"running"}, status="pausing", intent="pause")


def _pause(boss: Supervisor, chain: JobRow, say: Line, error: dict[str, Any] | None = None) -> None:
    changes, lines = exits.paused(say, error=error)
    boss.store.update_job(chain.id, {chain.status}, say=lines, **changes)


def _cancel_child(boss: Supervisor, child: JobRow) -> None:
    try:
        boss.cancel(child.id)
    except StateError:
        return  # it ended by itself meanwhile


def stop_at_once(boss: Supervisor, chain: JobRow) -> None:
    """Cancel the job that is under way, or rests, before its chain is cancelled."""
    todo, made = look(boss.store, chain)
    if todo.what == "wait":
        _cancel_child(boss, made[todo.stage])
        _show(boss.store, chain, look(boss.store, chain)[1])


def _succeeded(boss: Supervisor, chain: JobRow, made: Mapping[str, JobRow]) -> None:
    rows = list(made.values())
    done = {
        "status": "succeeded",
        "intent": None,
        "error": None,
        "finished_at": rows[-1].finished_at,
        "estimated_finish": None,
        "trained_tokens": sum(row.trained_tokens or 0 for row in rows),
        "result_files": [file for row in rows for file in row.result_files],
    }
    say = [Line(f"New fine-tuned model created: {rows[-1].name}"), Line("The job has successfully completed")]
    boss.store.update_job(chain.id, {chain.status}, say=say, **done)


def _failed(boss: Supervisor, chain: JobRow, todo: Next) -> None:
    """The job failed, or somebody cancelled it; resuming the chain does this stage again, as a new job."""
    assert todo.child is not None
    error = todo.child.error or {"code": "stage_cancelled", "message": "Its job was cancelled."}
    kept = " The stages before it are kept." if todo.number > 1 else ""
    said = f"{error['message'].rstrip('.')}.{kept}"
    message = f"{_title(chain, todo)} did not succeed. {said} Resume the chain to do this stage again."
    changes, say = exits.failed(error.get("code"), message, error.get("param"), boss.clock())
    boss.store.update_job(chain.id, {chain.status}, say=say, **changes)


def resume(boss: Supervisor, chain: JobRow) -> None:
    """Let a paused or failed chain go on: its job is resumed, or, if it failed, made anew.

    Raises StateError unless the chain is paused or failed, and what resuming the job or making a new one raises.
    """
    if chain.status not in ("paused", "failed"):
        raise StateError(f"The chain {chain.id} is {chain.status}; only a paused or failed one can be resumed.")
    chain = replace(chain, started_by="api")
    todo, made = look(boss.store, chain)
    if chain.status == "failed" and not made:
        why = (chain.error or {}).get("message", "")
        raise StateError(f"The chain {chain.id} failed before its first stage began; create it anew. {why}")
    if todo.what == "wait" and todo.child is not None and todo.child.status == "paused":
        boss.resume(todo.child.id)
    elif todo.what == "failed":
        make_stage(boss, chain, todo, _jobs_of(boss.store, chain.id, todo.stage) + 1)
    go = {"status": "running", "intent": None, "error": None, "finished_at": None, "started_by": "api"}
    boss.store.update_job(chain.id, {"paused", "failed"}, say=[Line("Fine-tuning job resumed")], **go)


# --- what people see -------------------------------------------------------------------------------------------------


def _stages(chain: JobRow) -> list[dict[str, Any]]:
    return (chain.tunewright or {})["stages"]


def _show(store: Store, chain: JobRow, made: Mapping[str, JobRow]) -> None:
    """Bring the list of stages in the chain's row up to date."""
    shown = stage_list(store.run(chain.id).job().stages, made)
    if shown != _stages(chain):
        store.update_job(chain.id, set(FOLLOWED), tunewright={**(chain.tunewright or {}), "stages": shown})


def _title(chain: JobRow, todo: Next) -> str:
    return f"Stage {todo.number} of {len(_stages(chain))}, '{todo.stage}',"
