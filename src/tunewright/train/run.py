"""From a job file to a result folder: the one place where parts are put together.

spec -> model, tokenizer, groups -> tuner, objective, optimizer -> plan -> loop -> result/
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from datetime import datetime
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from tunewright.core.durable import sweep
from tunewright.core.errors import RollBack, SpecError
from tunewright.core.events import EventWriter
from tunewright.core.example import Group
from tunewright.core.home import Home
from tunewright.core.run import BASE_IS_START, Run, read_artefact
from tunewright.core.spec import JobSpec, check_parts
from tunewright.data.rendered import StoredGroups
from tunewright.data.tokenizer import Tokenizer
from tunewright.models.heads import Head
from tunewright.models.layouts import PADDED, causal_lm
from tunewright.models.loader import bare_model, context_length, load_model, materialise
from tunewright.models.policy import Policy
from tunewright.objectives import OBJECTIVES
from tunewright.ops.noise import neftune
from tunewright.ops.quant import NONE, PACKAGE, count
from tunewright.ops.runtime import be_deterministic, choose_dtype, device, set_threads
from tunewright.train import meter, reinforce
from tunewright.train.asking import Asking, ask_teacher
from tunewright.train.balance import balanced
from tunewright.train.checkpoint import State, load_newest
from tunewright.train.describe import describe
from tunewright.train.fast import choose_path
from tunewright.train.finish import Start, artefact_writer, finish
from tunewright.train.heads import copy_body, load_with_new_head
from tunewright.train.judging import ask_judge
from tunewright.train.labels import job_head
from tunewright.train.loop import Parts, announce_checkpoint, train
from tunewright.train.optim import OPTIMIZERS, SCHEDULES
from tunewright.train.plan import Plan, rate_factor, resolve
from tunewright.train.preflight import Build, preflight
from tunewright.train.prepare import prepare
from tunewright.train.reference import find_reference
from tunewright.train.retain import build as retain
from tunewright.train.rollouts import Imagined
from tunewright.train.room import held_text, room_left, room_to_load
from tunewright.train.rows import load_groups, training_groups
from tunewright.train.teacher import check_teacher, load_teacher, teacher_bytes
from tunewright.train.value import with_value_head
from tunewright.tuners import TUNERS
from tunewright.tuners.base import Tuner
from tunewright.tuners.delta import merge_delta
from tunewright.tuners.peft_adapter import merge_adapter

LEAST_CONTEXT = 16  # tokens
MERGE = {"adapter": merge_adapter, "delta": merge_delta}
ASK = {"teacher": ask_teacher, "judge": ask_judge}  # an objective's `asks` -> who makes its rows


def run_job(run: Run, home: Home, events: EventWriter, stop: Callable[[], bool]) -> dict[str, Any]:
    """Run or continue the job in `run` to its end; returns the data of the `end` event.

    A roll-back is what a later attempt would do, in the same process: everything is built anew from the run folder.
    Raises a TunewrightError that says what went wrong; Interrupted when `stop` became true (a checkpoint was saved).
    """
    peak, rolled_back = meter.Peak(), False
    while True:
        try:
            return run_once(run, home, events, stop, peak, rolled_back)
        except RollBack:
            rolled_back = True
        # outside the except block, where the error no longer holds the model
        meter.release()


def run_once(
    run: Run, home: Home, events: EventWriter, stop: Callable[[], bool], peak: meter.Peak, rolled_back: bool
) -> dict[str, Any]:
    """From the run folder to the end of training. rolled_back: this attempt has worked on the job before."""
    job = run.job()
    spec = check_parts(job.spec, describe())
    saved = run.plan()
    earlier = None if saved is None else Plan(**saved)
    threads = set_threads(earlier.threads if earlier else spec.threads)
    dtype = choose_dtype(earlier.dtype if earlier else spec.dtype)
    be_deterministic()
    sweep(run.folder)
    start = find_start(run, job.start, job.base, home, events)
    tokenizer = Tokenizer.load(start.weights, now=datetime.fromtimestamp(job.created_at))
    objective = part(OBJECTIVES, spec.objective)
    tuner: Tuner = part(TUNERS, spec.tuner)
    context = context_left(start.weights, tuner)
    limit = context if spec.max_length == "auto" else min(spec.max_length, context)
    rolls = objective.card.needs_rollouts
    limit = reinforce.prompt_limit(objective, limit) if rolls else limit

    other = find_start(run, job.teacher.get("over"), job.teacher["base"], home, events) if job.teacher else None
    if objective.card.asks:
        ASK[objective.card.asks](Asking(run, job, spec, objective, home, events, stop, start, other))

    def load(role: str) -> StoredGroups:
        return load_groups(run, job, spec, tokenizer, objective, limit, role, events)

    groups = training_groups(job, load)
    valid: Sequence[Group] = load("validation") if job.validation else []

    head = job_head(run, spec, objective)
    quantization = NONE if earlier is None else earlier.quantization
    teacher = other if hasattr(objective, "teacher") else None
    if teacher is not None:
        check_teacher(spec, teacher, tokenizer)
    if earlier is None:
        part(TUNERS, spec.tuner).refuse(bare_model(start.weights, head))
        beside = retain.extra_bytes(spec, tuner.card, dtype.itemsize, start.over is not None)
        beside += 0 if other is None or objective.card.asks else teacher_bytes(other, start, dtype)
        dtype, quantization = room_to_load(start.weights, tuner.card, dtype, spec, beside)
    if quantization != NONE:
        events.write("message", held_text(quantization, spec.quantization), {"quantization": quantization})
    events.write("phase", "Loading the model", {"name": "loading", "done": 0, "total": 1})
    model = attach(start, tuner, spec, dtype, head, quantization)
    autocast = None if dtype == torch.float32 else dtype
    wanted, room = (earlier.path, math.inf) if earlier else (spec.path, room_left(spec.max_memory))
    path = choose_path(model, dtype, threads, home.cache / "kernels", wanted, room)
    events.write("message", path.why)
    policy = Policy(model, autocast, fast=path.forward, embedding_noise=neftune(model, spec.neftune_alpha))

    def frozen(beside: nn.Module, wanted: str, room: float = math.inf) -> tuple[Policy, str]:
        """A further model that is only asked, on the path `wanted` where it can be, and that path's name."""
        beside = beside.requires_grad_(False).eval()
        chosen = choose_path(beside, dtype, threads, home.cache / "kernels", wanted, room)
        return Policy(beside, autocast, fast=chosen.forward), chosen.name

    def second() -> Policy:
        """The policy at step 0, loaded again. On the same path, or it would round otherwise."""
        return frozen(attach(start, part(TUNERS, spec.tuner), spec, dtype, head, quantization), path.name)[0]

    reference = cache(partial(find_reference, tuner, policy, start.over is not None, second))
    if objective.card.needs_reference:
        objective.reference = reference()
        events.write("message", f"The reference, the model at step 0, is {objective.reference.how}")
    teacher_path = ""
    if teacher is not None:
        asked = (earlier.teacher_path, math.inf) if earlier else (path.name, room_left(spec.max_memory))
        objective.teacher, teacher_path = frozen(load_teacher(teacher, dtype, MERGE).to(device()), *asked)
    rollouts = None
    if rolls:
        given = (run, home, objective, policy, tuner, tokenizer, groups, context, other, events, stop)
        rollouts = reinforce.rollouts_of(*given)
    prepare(run, tuner, policy, objective, groups, spec.seed or 0, events, stop)
    plan = earlier or resolve(
        spec,
        Imagined(groups, objective) if rolls else groups,
        valid,
        tuner.card,
        dtype=str(dtype).removeprefix("torch."),
        path=path.name,
        teacher_path=teacher_path,
        quantization=quantization,
        threads=threads,
        context=context,
        parameters=count(policy.model),
        trainable=sum(p.numel() for p in tuner.trainable().values()),
        versions=versions(path.kernels, quantization),
        lr_factor=objective.card.lr_factor,
    )
    tuner.begin(plan.total_steps, plan.total_steps // plan.n_epochs)
    kept = retain.begin(run, job, spec, plan, tuner, policy, load, reference, events, stop)
    tuner = with_value_head(objective, policy, tuner)
    optimizer_class, optimizer_options = row(OPTIMIZERS, spec.optimizer)
    build = partial(optimizer_class.build, lr=plan.learning_rate, options=optimizer_options)
    schedule, schedule_options = row(SCHEDULES, spec.schedule)

    def rate(step: int) -> float:
        factor = schedule.factor(step, plan.total_steps, schedule_options)
        return plan.learning_rate * factor * rate_factor(plan, step)

    parts = Parts(
        run=run,
        spec=spec,
        plan=plan,
        policy=policy,
        tuner=tuner,
        objective=balanced(objective, policy, spec.router_loss),
        optimizer=build(tuner.trainable()),
        rate=rate,
        groups=groups,
        valid=valid,
        events=events,
        write_artefact=artefact_writer(job, spec, tuner, start, head, quantization),
        stop=stop,
        retain=kept,
        rollouts=rollouts,
        advised={e.data["advice"] for e in run.stream() if "advice" in e.data},
    )
    if policy.layout == PADDED:
        text = f"Rows run padded, in sets of similar length: {type(causal_lm(model)).__name__} cannot be run packed"
        events.write("message", text, {"layout": policy.layout})
    if earlier is None:
        plan = decide(parts, build, peak)
        parts = replace(parts, plan=plan)
    else:
        policy.set_checkpointing(plan.checkpointing)
        keep(plan, path.kernels, events)
    state = resume(parts, rolled_back)
    if events.attempt == 1 and not rolled_back:
        events.write("message", "Fine-tuning job started")
    with closing(rollouts) if rollouts else nullcontext():
        state = train(parts, state)
    parts.optimizer.zero_grad(set_to_none=True)
    meter.release()  # else reading the result back would come on top of the memory that training used
    finish(parts, state)
    return {
        "status": "succeeded",
        "trained_tokens": state.tokens,
        "steps": state.step,
        "metrics": state.last,
        "seconds": state.seconds,
        "predicted_seconds": plan.predicted_seconds,
        "peak_memory_bytes": peak.so_far(),
        "predicted_peak_memory_bytes": plan.peak_memory_bytes,
    }


def row(table: Any, chosen: Any) -> tuple[Any, Any]:
    """(the table's entry, its validated options)."""
    entry = table.load(chosen.name)
    try:
        return entry, entry.Options(**chosen.options)
    except ValidationError as e:  # options that do not go together; each alone was checked before
        text = "; ".join(error["msg"].removeprefix("Value error, ") for error in e.errors())
        raise SpecError(f"{table.kind} '{chosen.name}': {text}.", param=table.kind) from e


def part(table: Any, chosen: Any) -> Any:
    """An instance of the table's entry with its options."""
    entry, options = row(table, chosen)
    return entry(options)


def find_start(run: Run, name: str | None, base: str, home: Home, events: EventWriter) -> Start:
    """Where weights come from: the base model, or the artefact that lies in the run folder as `name`."""
    artefact = read_artefact(run.folder / name) if name else None
    if name and artefact and artefact.kind == "weights":
        return Start(run.folder / name, None, BASE_IS_START)
    events.write("phase", f"Preparing the base model {base}", {"name": "base", "done": 0, "total": 1})
    over = run.folder / name if name else None
    return Start(materialise(base, home), over, base, artefact)


def context_left(folder: Path, tuner: Tuner) -> int:
    """Tokens that a row may have. Raises SpecError if the tuner's virtual tokens leave no room for one."""
    context = context_length(folder)
    if tuner.n_virtual and context - tuner.n_virtual < LEAST_CONTEXT:
        raise SpecError(
            f"virtual_tokens is {tuner.n_virtual}, and the model's context is {context} tokens; leave at least "
            f"{LEAST_CONTEXT} of them to the rows.",
            param="tuner",
        )
    return context - tuner.n_virtual


def attach(
    start: Start, tuner: Tuner, spec: JobSpec, dtype: torch.dtype, head: Head | None, quantization: str
) -> nn.Module:
    """Load the weights and make them trainable. Raises SpecError if the tuner cannot go on from what is there."""
    whole = tuner.card.artefact == "weights"
    if start.record is not None and not whole and start.record.kind != tuner.card.artefact:
        was = start.record
        raise SpecError(
            f"The model to continue from is of kind '{was.kind}' (tuner {was.tuner.get('name')}); the tuner "
            f"'{spec.tuner.name}' goes on from kind '{tuner.card.artefact}' only. Use the same tuner, or one that "
            "trains all weights (full).",
            param="tuner",
        )
    held = torch.float32 if tuner.card.float32_base else dtype
    model = load_model(start.weights, held, head, quantization).to(device())
    new_head = head is not None and start.record is not None and start.record.head == "lm"
    if start.over is not None and start.record is not None and whole:
        merge = MERGE[start.record.kind]
        if new_head:
            copy_body(merge(load_model(start.weights, held).to(device()), start.over), model)
        else:
            model = merge(model, start.over)
    model = tuner.attach(model, seed=spec.seed or 0)
    if start.over is not None and not whole:
        load_with_new_head(tuner, start.over) if new_head else tuner.load(start.over)
    return model


def decide(parts: Parts, build: Build, peak: meter.Peak) -> Plan:
    """Measure, write plan.json and say what was decided."""
    if parts.rollouts is None:
        plan = preflight(parts, build, peak)
    else:
        plan = reinforce.with_sampling(preflight(reinforce.imagined(parts), build, peak), parts)
    parts.run.write_plan(plan.to_json())
    if (plan.micro_batch_tokens, plan.checkpointing) != (parts.plan.micro_batch_tokens, parts.plan.checkpointing):
        text = (
            f"To fit into {plan.available_memory_bytes / 1e9:.2f} GB of memory the job computes "
            f"{plan.micro_batch_tokens} tokens at once (else {parts.plan.micro_batch_tokens}) with checkpointing "
            f"{plan.checkpointing} (else {parts.plan.checkpointing}). The result is the same, a step takes longer."
        )
        parts.events.write("message", text)
    finish_at = datetime.fromtimestamp(plan.predicted_finish).strftime("%H:%M:%S")
    parts.events.write(
        "plan",
        f"{plan.n_rows} rows, {plan.total_steps} steps of {plan.batch_size}, {plan.n_epochs} epochs; "
        f"about {plan.predicted_seconds:.0f} s (until {finish_at}) and {plan.peak_memory_bytes / 2**30:.1f} GiB",
        plan.to_json(),
    )
    if plan.base.get("loss") is not None:
        parts.events.write("message", base_text(plan.base), {"base": plan.base})
    return plan


def base_text(base: dict[str, Any]) -> str:
    """How good the base model is at the job before step 1."""
    rows = f"{base['rows']} {'validation' if base['source'] == 'validation' else 'training'} rows"
    accuracy = base.get("mean_token_accuracy")
    more = "" if accuracy is None else f", mean token accuracy={accuracy:.3f}"
    return f"Before training: loss={base['loss']:.3f}{more} on {rows}"


def versions(kernels: str, quantization: str) -> dict[str, str]:
    """What the numbers of a run depend on besides its inputs. kernels: `tiles`, `torch` or `none`."""
    names = ("torch", "transformers", "peft", "tunewright", *([PACKAGE] if quantization != NONE else []))
    return {**{name: version(name) for name in names}, "kernels": kernels}


def keep(plan: Plan, kernels: str, events: EventWriter) -> Plan:
    """The plan of the earlier attempt, with a warning when the environment is not the one it was made in."""
    now = versions(kernels, plan.quantization)
    changed = [f"{k} {plan.versions.get(k)} -> {v}" for k, v in now.items() if plan.versions.get(k) != v]
    if changed:
        text = f"This attempt runs with other versions ({', '.join(changed)}): it resumes, but perhaps not bit for bit."
        events.write("message", text, {}, "warn")
    return plan


def resume(parts: Parts, rolled_back: bool) -> State:
    """Go back to the newest whole checkpoint and say so, or start at step 0."""
    state, kind = load_newest(parts.run, parts.tuner, parts.optimizer, parts.events)
    if parts.events.attempt > 1 or rolled_back:
        where = f"step {state.step}" if state.step else "the start"
        who = "After a roll-back the job" if rolled_back else f"Attempt {parts.events.attempt}"
        parts.events.write(
            "resumed",
            f"{who} goes on from {where}",
            {
                "step": state.step,
                "checkpoint": parts.run.checkpoint(state.step).name if state.step else None,
                "reason": "roll_back" if rolled_back else "attempt",
            },
        )
    announced = {e.data["step"] for e in parts.run.stream() if e.type == "checkpoint"}
    if kind is not None and state.step not in announced:
        # killed between the commit and its event
        announce_checkpoint(parts.events, state, kind)
    return state
