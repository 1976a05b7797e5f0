"""What tests of methods against forgetting share: the parts of a step without a run folder, and the step itself."""

from __future__ import annotations

from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from parts import groups_for, head_for, instance, prepared
from torch import Tensor

from tunewright.core.example import Group
from tunewright.core.spec import HEADS
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy
from tunewright.objectives import OBJECTIVES
from tunewright.ops.runtime import seed_step
from tunewright.train.loop import Parts, accumulate, means_of, pulls
from tunewright.train.reference import find_reference
from tunewright.train.retain import RETAIN
from tunewright.train.retain.base import Given, Retain
from tunewright.train.value import ValueHead
from tunewright.tuners import TUNERS

Step = tuple[dict[str, float], dict[str, Tensor]]


def parts_of(**given: Any) -> Parts:
    """The loop's parts, as far as a step needs them."""
    empty = dict.fromkeys((f.name for f in fields(Parts)), None)
    return Parts(**{**empty, "retain": (), "plan": SimpleNamespace(seed=5), **given})  # type: ignore[arg-type]


def make(
    folder: Path,
    tmp: Path,
    tuner: str = "lora",
    objective: str = "sft",
    methods: dict[str, dict[str, Any]] | None = None,
    *,
    rows: list[Group] | None = None,
    model: Any = None,
) -> Parts:
    """An attached tuner with methods begun over `rows`. methods: name -> options; None: all with their defaults."""
    found = instance(OBJECTIVES, objective)
    plain = instance(OBJECTIVES, HEADS[found.card.head])
    if "teacher" in found.card.required:
        found.teacher = another(folder)
    if hasattr(found, "value_head"):
        found.value_head = ValueHead(64, torch.device("cpu"))
    head = head_for(found.card)
    part = instance(TUNERS, tuner)
    attached = part.attach(model or load_model(folder, head=head), seed=3)
    if found.card.head == "lm":
        prepared(part, attached)
    elif part.card.needs_data:
        part.prepare(lambda n: gradients_of(attached, found, n))
    policy = Policy(attached)

    def copy() -> Policy:
        again = instance(TUNERS, tuner)
        return Policy(again.attach(load_model(folder, head=head), seed=3).requires_grad_(False).eval())

    reference = cache(partial(find_reference, part, policy, False, copy))
    if found.card.needs_reference:
        found.reference = reference()
    wanted = dict.fromkeys(RETAIN, None) if methods is None else methods
    begun: list[Retain] = []
    for name, options in wanted.items():
        entry = RETAIN.load(name)
        method = entry(entry.Options(**(options or {})), name)
        old = rows if rows is not None else groups_for(plain.card, n=5)
        needs = entry.card.rows == "required" or (options or {}).get("file")
        method.begin(
            Given(
                seed=5,
                batch_size=8,
                tuner=part,
                policy=policy,
                objective=plain,
                rows=old if needs else (),
                reference=reference() if entry.card.needs_reference else None,
                folder=tmp / name,
                events=SimpleNamespace(write=lambda *a: None),  # type: ignore[arg-type]
                stop=lambda: False,
            )
        )
        begun.append(method)
    return parts_of(policy=policy, tuner=part, objective=found, retain=begun)


def another(folder: Path) -> Policy:
    """A model like that in the folder, with other weights."""
    model = load_model(folder)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(9)
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return Policy(model.requires_grad_(False))


def gradients_of(model: Any, objective: Any, n: int) -> Any:
    from tunewright.ops.packing import collate

    for group in groups_for(objective.card)[:n]:
        objective(Policy(model), collate([group]))["loss"].total.backward()
        yield


def shake(parts: Parts, size: float = 0.05) -> None:
    """Move everything that is trained away from where it started."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parts.tuner.trainable().values():
            p.add_(size * torch.randn(p.shape, generator=g))
    parts.tuner.after_step(1)


def step(parts: Parts, groups: list[Group], tokens: int = 10**6, number: int = 1) -> Step:
    """({term: mean or penalty}, {parameter: gradient}) of one step, as the loop makes them, without the update."""
    seed_step(5, number)
    for p in parts.tuner.trainable().values():
        p.grad = None
    parts.policy.model.train()
    parts.tuner.before_step(number)
    sums, weights = accumulate(parts, groups, tokens, number)
    parts.tuner.on_gradients(number)
    means = {**means_of(sums, weights), **pulls(parts)}
    return means, {k: p.grad.clone() for k, p in parts.tuner.trainable().items() if p.grad is not None}
