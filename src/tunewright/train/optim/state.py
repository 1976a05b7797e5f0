"""An optimizer's state as named tensors and back, bit for bit: what a checkpoint holds of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NUMBERS = {"int": (int, torch.int64), "float": (float, torch.float64)}


def optimizer_state(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Tensor]:
    """The optimizer's tensors by '<parameter name>|<key>', plain numbers by '<parameter name>|<key>:int' (or float).

    names: id(parameter) -> name. Raises TypeError for a state that is neither.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if value is None:
                continue
            kind = "" if isinstance(value, Tensor) else f":{type(value).__name__}"
            tensor = value.detach().contiguous() if isinstance(value, Tensor) else _as_tensor(value)
            # a safetensors file holds no tensor twice (bitsandbytes' parameters share their maps)
            shared = tensor.untyped_storage().data_ptr() in seen
            seen.add(tensor.untyped_storage().data_ptr())
            found[f"{names[id(p)]}|{key}{kind}"] = tensor.clone() if shared else tensor
    return found


def _as_tensor(value: int | float) -> Tensor:
    if type(value).__name__ not in NUMBERS:
        raise TypeError(f"an optimizer's state holds a {type(value).__name__}, which a checkpoint cannot")
    return torch.tensor(value, dtype=NUMBERS[type(value).__name__][1])


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Put back what optimizer_state() returned, on the parameters' devices."""
    optimizer.state.clear()
    for key, value in tensors.items():
        name, _, slot = key.rpartition("|")
        slot, _, kind = slot.partition(":")
        p = parameters[name]
        optimizer.state[p][slot] = NUMBERS[kind][0](value.item()) if kind else value.to(p.device)
