"""What the tuners that run peft inside share: wrapping the model, switching off, PEFT's two files, merging."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from torch import Tensor, nn

from tunewright.core.errors import SpecError
from tunewright.ops.noise import KeyedDropout
from tunewright.ops.quant import dequantise
from tunewright.ops.runtime import quiet
from tunewright.tuners import base
from tunewright.tuners.adapter_files import VIRTUAL, WEIGHTS, check_same_shape, method_of, read_config, write_adapter
from tunewright.tuners.files import copy_into, read_tensors

# layers of an encoder-decoder that run on its source: the encoder's, and keys and values of the attention to it
SOURCE_SIDE = re.compile(r"\.encoder\.|\.EncDecAttention\.[kv]$|\.encoder_attn\.[kv]_proj$")


class PeftTuner(base.Tuner):
    """The moments that are the same for every method of peft. A method adds its card, its options and `config`."""

    model: PeftModel

    def config(self, model: nn.Module, seed: int) -> PeftConfig:
        """peft's configuration for the model. Raises SpecError if the model has no such layers."""
        raise NotImplementedError

    def refuse(self, model: nn.Module) -> None:
        self.config(model, 0)

    def attach(self, model: nn.Module, seed: int) -> nn.Module:
        """Wrap the layers; dropout is ours, so that it does not depend on how a step is cut. Raises SpecError."""
        config = self.config(model, seed)
        with torch.random.fork_rng(), quiet():
            torch.manual_seed(seed)
            self.model = get_peft_model(model, config)  # type: ignore[arg-type,assignment]
        key_dropout(self.model, getattr(self.options, "dropout", 0.0))
        base.to_float32(self.trainable())
        return self.model

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def off(self) -> Iterator[None]:
        with self.model.disable_adapter():
            yield

    def save(self, folder: Path, base: str) -> None:
        """peft's two files: adapter_config.json and adapter_model.safetensors."""
        write_adapter(folder, self.model.peft_config["default"].to_dict(), base, self.in_file())

    def load(self, folder: Path) -> None:
        """Raises CheckpointError if the files are unreadable, SpecError if they are of another method or shape."""
        check_same_shape(self.model.peft_config["default"].to_dict(), folder)
        copy_into(self.in_file(), read_tensors(folder / WEIGHTS), "the adapter")

    def merge(self) -> nn.Module:
        """The base with the adapter folded into its weights, in its dtype (use float32 to lose nothing); of a quantised
        base, into what its codes stand for."""
        dequantise(self.model)
        return self.model.merge_and_unload()  # type: ignore[operator]

    def in_file(self) -> dict[str, Tensor]:
        """Name in the file -> what is trained (and, where a method has more to save, that)."""
        return {file_name(name): p for name, p in self.trainable().items()}


def file_name(name: str) -> str:
    """A parameter's name in peft's file: without the adapter's own name, which is always `default` here."""
    name = name.replace(".modules_to_save.default.", ".").replace("magnitude_vector.default.weight", "magnitude_vector")
    return re.sub(r"\.default(?=\.|$)", "", name)


def key_dropout(model: nn.Module, p: float) -> None:
    """Put our dropout in the place of peft's. p: 0 leaves everything as it is."""
    two_sides = bool(getattr(model, "config").is_encoder_decoder)  # noqa: B009 peft forwards it
    for name, module in model.named_modules() if p else ():
        for kind in ("lora_dropout", "vera_dropout"):
            if hasattr(module, kind):
                getattr(module, kind)["default"] = KeyedDropout(p, name, two_sides and bool(SOURCE_SIDE.search(name)))


def merge_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with a saved adapter folded into its weights, as a plain model again (load it in float32).

    Raises CheckpointError if the files cannot be read, SpecError if it is of a method that has no place in the weights.
    """
    config = read_config(folder)
    if config["peft_type"] not in PeftType.__members__ or VIRTUAL in config:
        raise SpecError(
            f"'{folder.name}' is an adapter of the method {method_of(config)}, which cannot be folded into the "
            "weights. Continue it with its own tuner.",
            param="tuner",
        )
    read_tensors(folder / WEIGHTS)  # peft would look for a pickle file if this one were missing
    with quiet():
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()  # type: ignore[arg-type,operator]
