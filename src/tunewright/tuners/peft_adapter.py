"""What the tuners that run peft inside share: wrapping the model, switching off, PEFT's two files, merging."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from tunewright.core.errors import CheckpointError, SpecError
from tunewright.ops.noise import KeyedDropout
from tunewright.ops.runtime import quiet
from tunewright.tuners import base
from tunewright.tuners.files import copy_into, read_tensors

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# layers of an encoder-decoder that run on its source: the encoder's, and keys and values of the attention to it
SOURCE_SIDE = re.compile(r"\.encoder\.|\.EncDecAttention\.[kv]$|\.encoder_attn\.[kv]_proj$")
# our option -> peft's field: what must agree when training goes on from a saved adapter
SHAPE = {
    "r": "r",
    "initial_r": "init_r",
    "alpha": "lora_alpha",
    "block_size": "oft_block_size",
    "target_modules": "target_modules",
    "feedforward_modules": "feedforward_modules",
}
SETS = ("target_modules", "feedforward_modules", "exclude_modules")  # peft keeps them as sets, a file sorted


class PeftTuner(base.Tuner):
    """The moments that are the same for every method of peft. A method adds its card, its options and `config`."""

    model: PeftModel

    def config(self, model: nn.Module, seed: int) -> PeftConfig:
        """peft's configuration for the model. Raises SpecError if the model has no such layers."""
        raise NotImplementedError

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
        write_adapter(folder, self.model.peft_config["default"], base, self.in_file())

    def load(self, folder: Path) -> None:
        """Raises CheckpointError if the files are unreadable, SpecError if they are of another method or shape."""
        check_same_shape(self.model.peft_config["default"], folder)
        copy_into(self.in_file(), read_tensors(folder / WEIGHTS), "the adapter")

    def merge(self) -> nn.Module:
        """The base with the adapter folded into its weights, in its dtype (use float32 to lose nothing)."""
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


def write_adapter(folder: Path, config: PeftConfig, base: str, tensors: dict[str, Tensor]) -> None:
    """PEFT's two files. base: the base model's name or folder, as the config will say it."""
    saved = {**config.to_dict(), "base_model_name_or_path": base, "inference_mode": True}
    saved |= {key: sorted(saved[key]) for key in SETS if isinstance(saved.get(key), set | list)}
    (folder / CONFIG).write_text(json.dumps(saved, indent=2, sort_keys=True, default=_plain) + "\n")
    save_file({k: t.detach().contiguous() for k, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises CheckpointError if it is missing or is no adapter's."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        known = {"peft_type", "target_modules"} <= config.keys()
    except (OSError, ValueError, AttributeError) as e:
        raise CheckpointError(f"'{folder.name}' is not an adapter: its {CONFIG} cannot be read.") from e
    if not known:
        raise CheckpointError(f"'{folder.name}' is not an adapter: its {CONFIG} says no method or no target_modules.")
    return config


def method_of(config: dict[str, Any]) -> str:
    """What an adapter is, from its config: lora, rslora, dora, adalora, vera, oft, ia3 or another of peft's."""
    variant = {"dora": config.get("use_dora"), "rslora": config.get("use_rslora")}
    return next((name for name, is_so in variant.items() if is_so), str(config["peft_type"]).lower())


def shape_of(config: dict[str, Any]) -> dict[str, Any]:
    """{"method", and the options of SHAPE that the method has}, from a config as it is in a file."""
    found = {ours: config[theirs] for ours, theirs in SHAPE.items() if config.get(theirs) is not None}
    plain = {k: sorted(v) if isinstance(v, list | set) else v for k, v in found.items()}
    return {"method": method_of(config), **plain}


def saved_shape(folder: Path) -> dict[str, Any]:
    """shape_of a saved adapter. Raises CheckpointError if it cannot be read."""
    return shape_of(read_config(folder))


def check_same_shape(config: PeftConfig, folder: Path) -> None:
    """Raise SpecError, naming both values, if a saved adapter cannot be continued with this configuration."""
    plain = {k: getattr(v, "value", v) for k, v in config.to_dict().items()}
    mine, theirs = shape_of(plain), saved_shape(folder)
    differing = [
        f"{k} is {theirs.get(k)} there and {mine.get(k)} in this job"
        for k in {**mine, **theirs}
        if mine.get(k) != theirs.get(k)
    ]
    if differing:
        raise SpecError(
            f"The adapter to continue from does not fit this job's tuner: {'; '.join(differing)}. "
            "Use the same tuner with the same values in its options.",
            param="tuner",
        )


def merge_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with a saved adapter folded into its weights, as a plain model again (load it in float32).

    Raises CheckpointError if the files cannot be read.
    """
    read_config(folder)
    read_tensors(folder / WEIGHTS)  # peft would look for a pickle file if this one were missing
    with quiet():
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()  # type: ignore[arg-type,operator]
