"""A delta: the tensors, or single entries of tensors, in which a tuned model differs from its base.

It holds the new values and not differences: a floating-point sum would not always give back what was trained, and its
reverse not always the base. Setting values is exact both ways.

delta_config.json    base_model_name_or_path; tensors: {name: {kind, shape}}
delta.safetensors    `whole`, `added`: the tensor, float32; `sparse`: name|at (ascending flat positions), name|values
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tunewright.core.errors import CheckpointError
from tunewright.tuners.files import read_tensors

CONFIG = "delta_config.json"
WEIGHTS = "delta.safetensors"
WHOLE, ADDED, SPARSE, ABSENT = "whole", "added", "sparse", "absent"


@dataclass(frozen=True)
class Piece:
    """What one tensor becomes. kind: `whole` (all its values), `added` (a bias that the base has not), `sparse` (the
    values at the ascending flat positions `at`, int32 or int64) or `absent` (only in what undoes an added one)."""

    kind: str
    shape: tuple[int, ...]
    values: Tensor
    at: Tensor | None = None


Delta = dict[str, Piece]


def save_delta(folder: Path, base: str, delta: Delta) -> None:
    """Write a delta's two files. base: the base model's name or folder."""
    tensors: dict[str, Tensor] = {}
    for name, piece in delta.items():
        key = f"{name}|values" if piece.kind == SPARSE else name
        tensors[key] = piece.values.detach().float().contiguous()
        if piece.at is not None:
            tensors[f"{name}|at"] = piece.at
    described = {name: {"kind": piece.kind, "shape": list(piece.shape)} for name, piece in delta.items()}
    config = {"format_version": 1, "base_model_name_or_path": base, "tensors": described}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def is_delta(folder: Path) -> bool:
    """Whether the folder holds a delta, and not peft's adapter."""
    return (folder / CONFIG).is_file()


def read_delta(folder: Path) -> Delta:
    """The delta in a folder. Raises CheckpointError if it is missing, damaged or contradicts itself."""
    try:
        described = json.loads((folder / CONFIG).read_bytes())["tensors"]
        shapes = {name: (d["kind"], tuple(map(int, d["shape"]))) for name, d in described.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"'{folder.name}' is not a delta: its {CONFIG} cannot be read.") from e
    tensors = read_tensors(folder / WEIGHTS)
    return {name: _piece(folder, tensors, name, *given) for name, given in shapes.items()}


def _piece(folder: Path, tensors: dict[str, Tensor], name: str, kind: str, shape: tuple[int, ...]) -> Piece:
    values, at = tensors.get(f"{name}|values" if kind == SPARSE else name), tensors.get(f"{name}|at")
    if values is None or kind not in (WHOLE, ADDED, SPARSE) or (kind == SPARSE) != (at is not None):
        raise CheckpointError(f"The delta '{folder.name}' does not hold the tensor {name} that its {CONFIG} names.")
    size = torch.Size(shape).numel()
    fits = tuple(values.shape) == shape if at is None else len(at) == values.numel() and _ascending(at, size)
    if not fits:
        raise CheckpointError(f"The delta '{folder.name}' is damaged: the tensor {name} does not fit its shape.")
    return Piece(kind, shape, values, at)


def _ascending(at: Tensor, size: int) -> bool:
    return not len(at) or bool((at[1:] > at[:-1]).all() and at[0] >= 0 and at[-1] < size)


@torch.no_grad()
def apply_delta(model: nn.Module, delta: Delta) -> Delta:
    """Set the model's values to the delta's, in the model's dtype; returns the delta that undoes it bit for bit.

    Raises CheckpointError if a tensor does not fit, and changes nothing.
    """
    parameters = dict(model.named_parameters())
    wrong = [name for name, piece in delta.items() if not _fits(model, parameters, name, piece)]
    if wrong:
        raise CheckpointError(
            f"The delta does not fit its base model: {len(wrong)} tensors differ, first {wrong[0]}.",
            code="adapter_does_not_fit",
        )
    return {name: _set(model, parameters.get(name), name, piece) for name, piece in delta.items()}


def _fits(model: nn.Module, parameters: dict[str, nn.Parameter], name: str, piece: Piece) -> bool:
    if piece.kind == ADDED:
        layer = _layer_of(model, name)
        return isinstance(layer, nn.Linear) and layer.bias is None and piece.shape == (layer.out_features,)
    return name in parameters and tuple(parameters[name].shape) == piece.shape


def _layer_of(model: nn.Module, name: str) -> nn.Module | None:
    """The layer whose bias `name` is."""
    path, _, leaf = name.rpartition(".")
    return dict(model.named_modules()).get(path) if leaf == "bias" else None


def _set(model: nn.Module, p: nn.Parameter | None, name: str, piece: Piece) -> Piece:
    """Set one tensor; returns what undoes it."""
    if p is None or piece.kind == ABSENT:
        layer = model.get_submodule(name.rpartition(".")[0])
        gone = Piece(ADDED, piece.shape, layer.bias.detach()) if p is not None else None  # type: ignore[union-attr,operator]
        layer.bias = None if gone else nn.Parameter(piece.values.to(layer.weight))  # type: ignore[arg-type]
        return gone or Piece(ABSENT, piece.shape, torch.empty(0))
    if piece.at is None:
        before = Piece(WHOLE, piece.shape, p.detach().clone())
        p.copy_(piece.values)
        return before
    before = Piece(SPARSE, piece.shape, take(p, piece.at), piece.at)
    put(p, piece.at, piece.values)
    return before


def take(p: Tensor, at: Tensor) -> Tensor:
    """[k] the entries of `p` at flat positions [k]."""
    return p.detach().reshape(-1).index_select(0, at)


@torch.no_grad()
def put(p: Tensor, at: Tensor, values: Tensor) -> None:
    """Set the entries of `p` at flat positions [k], in its dtype. values: k numbers of any shape."""
    p.view(-1).index_copy_(0, at.long(), values.detach().reshape(-1).to(p))


def merge_delta(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with a saved delta set in its weights (load it in float32 to lose nothing)."""
    apply_delta(model, read_delta(folder))
    return model
