"""Full fine-tuning: every parameter is trained, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from tunewright.core.errors import CheckpointError
from tunewright.ops.runtime import quiet
from tunewright.tuners import base
from tunewright.tuners.base import TunerCard
from tunewright.tuners.files import copy_into, read_tensors


class Full(base.Tuner):
    """Load the base in float32 (the card says so): what is trained must not start from rounded weights."""

    class Options(base.Options):
        pass

    card: ClassVar[TunerCard] = TunerCard(
        title="Full fine-tuning",
        artefact="weights",
        mergeable=True,
        identity_at_start=True,
        works_on_nf4=False,
        default_lr=5e-5,
        float32_base=True,
    )

    model: nn.Module

    def attach(self, model: nn.Module, seed: int) -> nn.Module:
        self.model = model
        model.requires_grad_(True)
        base.to_float32(self.trainable())
        self._base_folder = Path(model.config._name_or_path)  # type: ignore[union-attr,arg-type]
        return model

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    @contextmanager
    def off(self) -> Iterator[None]:
        """The base's weights are read again from its folder for the time of the block: memory holds both, and the
        reading takes about a second a gigabyte. Do not call backward on a graph built outside within the block."""
        parameters = self.trainable()
        trained = {name: p.detach().clone() for name, p in parameters.items()}
        tensors = _read_folder(self._base_folder)
        copy_into(parameters, {k: v for k, v in tensors.items() if k in parameters}, "the base model")
        try:
            yield
        finally:
            copy_into(parameters, trained, "the trained model")

    def save(self, folder: Path, base: str) -> None:
        """A whole model folder in transformers' layout, float32 (nothing is rounded)."""
        self.model.config.dtype = torch.float32  # type: ignore[union-attr]
        with quiet():
            self.model.save_pretrained(folder)  # type: ignore[operator]

    def load(self, folder: Path) -> None:
        parameters = self.trainable()
        tensors = _read_folder(folder)
        copy_into(parameters, {k: v for k, v in tensors.items() if k in parameters}, f"'{folder.name}'")

    def merge(self) -> nn.Module:
        return self.model


def _read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder. Raises CheckpointError if there are none."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"'{folder.name}' holds no *.safetensors weights.")
    return {k: v for p in paths for k, v in read_tensors(p).items()}
