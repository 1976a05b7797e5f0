"""What every contract test needs of a part: an instance with default options, and data of a shape it can use."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tunewright.core.example import Example, Group
from tunewright.models.heads import CLASSES, Head
from tunewright.models.policy import Policy
from tunewright.objectives.sft import SFT
from tunewright.ops.packing import collate

# where the defaults have nothing to train in the tiny model, which has no biases
OPTIONS: dict[str, dict[str, Any]] = {"bitfit": {"add_biases": True}}


def instance(table: Any, name: str, **options: Any) -> Any:
    """The row's part with its default options, but for those given."""
    part = table.load(name)
    return part(part.Options(**{**OPTIONS.get(name, {}), **options}))


def prepared(tuner: Any, model: Any) -> Any:
    """The attached model, its tuner having seen the data if it asks for any."""
    if tuner.card.needs_data:
        tuner.prepare(lambda n: row_gradients(model, groups_for(SFT.card)[:n]))
    return model


def row_gradients(model: Any, groups: list[Group]) -> Iterator[None]:
    """The gradient of each row's summed loss, in turn."""
    for group in groups:
        SFT(SFT.Options())(Policy(model), collate([group]))["loss"].total.backward()
        yield


def head_for(card: Any) -> Head | None:
    """The model's head that the objective trains."""
    if card.head == "lm":
        return None
    return Head(card.head, ("no", "yes") if card.head in CLASSES else ("value",))


def groups_for(card: Any, n: int = 6, vocab: int = 470) -> list[Group]:
    """n groups of the size the objective asks for, of varied lengths; the examples of a group share their prompt."""
    rng = random.Random(0)
    size = card.group_size or 3
    groups = []
    for i in range(n):
        prompt = [rng.randrange(vocab) for _ in range(rng.randint(2, 9))]
        examples = []
        for _ in range(size):
            answer = [rng.randrange(vocab) for _ in range(rng.randint(1, 7))]
            weights = [0.0] * len(prompt) + [rng.choice([1.0, 1.0, 0.5]) for _ in answer]
            example = Example(tuple(prompt + answer), tuple(weights), source=i + 1)
            if "labelled" in card.shapes:
                of_row = {"labels": ((), (0,), (1,), (0, 1))[i % 4]} if card.head == "multilabel" else {"label": i % 2}
                example = replace(example, weights=(0.0,) * len(weights), **of_row)
            if card.needs_rollouts:
                example = replace(example, per_token=numbers_of(example, rng))
            examples.append(example)
        groups.append(Group(tuple(examples), prefix=len(prompt)))
    return groups


def numbers_of(example: Example, rng: random.Random) -> dict[str, tuple[float, ...]]:
    """What a rollout's tokens come with, near what the tiny model makes of random tokens."""
    n, advantage = len(example.ids), rng.uniform(-2, 2)
    old = tuple(rng.uniform(-7.0, -5.5) for _ in range(n))
    values = {k: tuple(rng.uniform(-1, 1) for _ in range(n)) for k in ("old_value", "return")}
    return {"advantage": (advantage,) * n, "old_logp": old, "reference_logp": old, **values}


def with_adapter(model: Any, folder: Path) -> Any:
    """A plain model with a saved adapter over it: by peft, or by hooks that compute our own format's formula."""
    from peft import PeftModel, PeftType

    config = json.loads((folder / "adapter_config.json").read_text())
    if config["peft_type"] in PeftType.__members__:
        return PeftModel.from_pretrained(model, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in config["target_modules"]:
        key = f"base_model.model.{name}.adapter"
        w = {k: tensors[f"{key}_{k}"] for k in ("down.weight", "down.bias", "up.weight", "up.bias")}
        model.get_submodule(name).register_forward_hook(partial(bottleneck, w=w, config=config))
    return model


def bottleneck(module: Any, inputs: Any, y: torch.Tensor, w: dict[str, torch.Tensor], config: Any) -> torch.Tensor:
    """y + scale * (up f(down z + b) + c), in float64."""
    z = (inputs[0] if config["form"] == "parallel" else y).double()
    f = getattr(torch.nn.functional, config["activation"])
    inner = f(z @ w["down.weight"].double().T + w["down.bias"].double())
    return (y + config["scale"] * (inner @ w["up.weight"].double().T + w["up.bias"].double())).to(y.dtype)
