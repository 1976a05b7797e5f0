"""A head for whole rows over what was tuned to write text: the body goes on from there, the head begins anew."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tunewright.core.errors import SpecError
from tunewright.tuners.adapter_files import CONFIG, WEIGHTS
from tunewright.tuners.files import read_tensors


@torch.no_grad()
def copy_body(source: nn.Module, target: nn.Module) -> None:
    """Give `target` every tensor of `source` that both have: all below the heads."""
    tensors = dict(source.named_parameters())
    for name, p in target.named_parameters():
        if name in tensors:
            p.copy_(tensors[name])


def load_with_new_head(tuner: Any, folder: Path) -> None:
    """Load an adapter of a language model into a tuner whose model has a head, which keeps its first draw.

    Raises SpecError for a tuner whose files cannot be told from a head's, and what the tuner's load() raises.
    """
    in_file = getattr(tuner, "in_file", None)
    if in_file is None:
        raise SpecError(
            "A model with a head for whole rows can go on from an adapter of the LoRA family, or with a tuner that "
            "trains all weights (full); this adapter is of another kind.",
            param="tuner",
        )
    saved = read_tensors(folder / WEIGHTS)
    own = {name: p.detach().cpu().contiguous() for name, p in in_file().items() if name not in saved}
    with tempfile.TemporaryDirectory(prefix="tunewright-head-") as place:
        shutil.copyfile(folder / CONFIG, Path(place) / CONFIG)
        save_file({**saved, **own}, Path(place) / WEIGHTS)
        tuner.load(Path(place))
