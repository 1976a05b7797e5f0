"""Full fine-tuning: every parameter is trained, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

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
        copy_into(parameters, _read(self.model, self._base_folder), "the base model")
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
        copy_into(self.trainable(), _read(self.model, folder), f"'{folder.name}'")

    def merge(self) -> nn.Module:
        return self.model


def _read(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model folder that are parameters of `model`. Raises CheckpointError if some are not there."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"'{folder.name}' holds no *.safetensors weights.")
    names = {name for name, _ in model.named_parameters()}
    tensors = {k: v for p in paths for k, v in read_tensors(p).items() if k in names}
    return tensors if len(tensors) == len(names) else _read_converted(model, folder)


def _read_converted(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The same where the files have other names than the parameters: Mixtral's experts lie there one by one, GPT-2's
    layers without a prefix. transformers knows the way from one to the other."""
    with quiet():
        opened, report = type(model).from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    missing = sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])])
    if missing:
        raise CheckpointError(
            f"The weights of '{folder.name}' do not fit the model: {len(missing)} tensors differ, first {missing[0]}."
        )
    return dict(opened.named_parameters())
