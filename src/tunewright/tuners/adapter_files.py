"""An adapter's two files, adapter_config.json and adapter_model.safetensors, and whether they fit. Without peft."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from tunewright.core.errors import CheckpointError, SpecError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# our option -> the field of the file: what must agree when training goes on from a saved adapter
SHAPE = {
    "r": "r",
    "initial_r": "init_r",
    "alpha": "lora_alpha",
    "block_size": "oft_block_size",
    "form": "form",
    "size": "size",
    "activation": "activation",
    "scale": "scale",
    "target_modules": "target_modules",
    "feedforward_modules": "feedforward_modules",
    "virtual_tokens": "num_virtual_tokens",
    "encoder": "encoder_reparameterization_type",
    "layers": "encoder_num_layers",
    "projection": "prefix_projection",
    "hidden_size": "encoder_hidden_size",
    "experts": "target_parameters",
}
VIRTUAL = "num_virtual_tokens"  # the field that soft prompts have
# peft keeps them as sets, a file sorted
SETS = ("target_modules", "feedforward_modules", "exclude_modules", "target_parameters")


def write_adapter(folder: Path, config: dict[str, Any], base: str, tensors: Mapping[str, Tensor]) -> None:
    """The two files. base: the base model's name or folder, as the config will say it."""
    saved = {**config, "base_model_name_or_path": base, "inference_mode": True}
    saved |= {key: sorted(saved[key]) for key in SETS if isinstance(saved.get(key), set | list)}
    (folder / CONFIG).write_text(json.dumps(saved, indent=2, sort_keys=True, default=_plain) + "\n")
    save_file({k: t.detach().contiguous() for k, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises CheckpointError if it is missing or is no adapter's."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        known = "peft_type" in config and bool({"target_modules", VIRTUAL} & config.keys())
    except (OSError, ValueError, AttributeError) as e:
        raise CheckpointError(f"'{folder.name}' is not an adapter: its {CONFIG} cannot be read.") from e
    if not known:
        raise CheckpointError(f"'{folder.name}' is not an adapter: its {CONFIG} does not say what it changes.")
    return config


def method_of(config: dict[str, Any]) -> str:
    """What an adapter is, from its config: lora, rslora, dora, adalora, vera, oft, ia3, bottleneck …"""
    variant = {"dora": config.get("use_dora"), "rslora": config.get("use_rslora")}
    kind = config["peft_type"]
    return next((name for name, is_so in variant.items() if is_so), str(getattr(kind, "value", kind)).lower())


def shape_of(config: dict[str, Any]) -> dict[str, Any]:
    """{"method", and the options of SHAPE that the method has}, from a config as it is in a file."""
    found = {ours: config[theirs] for ours, theirs in SHAPE.items() if config.get(theirs) not in (None, [], set())}
    plain = {k: sorted(v) if isinstance(v, list | set) else v for k, v in found.items()}
    return {"method": method_of(config), **plain}


def saved_shape(folder: Path) -> dict[str, Any]:
    """shape_of a saved adapter. Raises CheckpointError if it cannot be read."""
    return shape_of(read_config(folder))


def check_same_shape(config: dict[str, Any], folder: Path) -> None:
    """Raise SpecError, naming both values, if a saved adapter cannot be continued by a tuner of this config."""
    mine, theirs = shape_of(config), saved_shape(folder)
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
