"""Reading trained weights back: safetensors only, names and shapes must fit, or nothing changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tunewright.core.errors import CheckpointError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file. Raises CheckpointError if it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"'{path.parent.name}' has no file {path.name}.")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"The weights file {path.name} is damaged: {e}") from e


def copy_into(parameters: Mapping[str, Tensor], tensors: dict[str, Tensor], what: str) -> None:
    """Set the parameters from tensors of the same names and shapes. Raises CheckpointError and changes nothing else."""
    wrong = sorted(set(parameters) ^ set(tensors))
    wrong += [k for k in parameters if k in tensors and parameters[k].shape != tensors[k].shape]
    if wrong:
        raise CheckpointError(
            f"The weights of {what} do not fit the model: {len(wrong)} tensors differ, first {wrong[0]}."
        )
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[name])
