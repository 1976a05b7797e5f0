"""LoRA: W x + (alpha / r) B A x with trained A, B and frozen W (Hu et al. 2021, arXiv 2106.09685). peft inside."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from pydantic import Field
from safetensors.torch import save_file
from torch import nn

from tunewright.core.errors import CheckpointError, SpecError
from tunewright.ops.noise import KeyedDropout
from tunewright.ops.runtime import quiet
from tunewright.tuners import base
from tunewright.tuners.base import TunerCard
from tunewright.tuners.files import copy_into, read_tensors
from tunewright.tuners.targets import lora_config

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# layers of an encoder-decoder that run on its source: the encoder's, and keys and values of the attention to it
SOURCE_SIDE = re.compile(r"\.encoder\.|\.EncDecAttention\.[kv]$|\.encoder_attn\.[kv]_proj$")


class LoRA(base.Tuner):
    """A starts random (from the seed), B at zero, so the model starts exactly as the base. A and B are float32."""

    class Options(base.Options):
        r: int = Field(16, ge=1, le=1024, description="rank of the update")
        alpha: int = Field(32, ge=1, le=65536, description="the update's scale is alpha / r")
        dropout: float = Field(
            0.0,
            ge=0,
            le=0.9,
            description="share of the inputs of A that is zero in a step; without the fast path",
        )
        target_modules: Literal["all-linear"] | list[str] = Field(
            "all-linear", description="names of linear layers, or all-linear: each one of the blocks, not the LM head"
        )

    card: ClassVar[TunerCard] = TunerCard(
        title="LoRA",
        artefact="adapter",
        mergeable=True,
        identity_at_start=True,
        works_on_nf4=True,
        default_lr=1e-3,
    )

    model: PeftModel

    def attach(self, model: nn.Module, seed: int) -> nn.Module:
        """Wrap the linear layers. Raises SpecError if target_modules names a layer that the model has not."""
        o = self.options
        config = LoraConfig(
            r=o.r,
            lora_alpha=o.alpha,
            lora_dropout=o.dropout,
            bias="none",
            **lora_config(model, o.target_modules),
        )
        with torch.random.fork_rng(), quiet():
            torch.manual_seed(seed)
            self.model = get_peft_model(model, config)  # type: ignore[arg-type,assignment]
        if o.dropout:
            _key_dropout(self.model, o.dropout)
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
        config = self.model.peft_config["default"]
        saved = {**config.to_dict(), "base_model_name_or_path": base, "inference_mode": True}
        saved["target_modules"] = sorted(saved["target_modules"])
        (folder / CONFIG).write_text(json.dumps(saved, indent=2, sort_keys=True, default=_plain) + "\n")
        save_file(
            {k: p.detach().contiguous() for k, p in self._by_file_name().items()}, folder / WEIGHTS, {"format": "pt"}
        )

    def load(self, folder: Path) -> None:
        """Raises CheckpointError if the files are unreadable, SpecError if they have another rank, scale or targets."""
        mine, theirs = self._shape(), saved_shape(folder)
        differing = [f"{k} is {theirs[k]} there and {mine[k]} in this job" for k in mine if mine[k] != theirs[k]]
        if differing:
            raise SpecError(
                f"The adapter to continue from does not fit this job's tuner: {'; '.join(differing)}. "
                "Use the same values in the tuner's options.",
                param="tuner",
            )
        copy_into(self._by_file_name(), read_tensors(folder / WEIGHTS), "the adapter")

    def merge(self) -> nn.Module:
        """The base with scale * B A added to its weights, in the dtype of the base (use float32 to lose nothing)."""
        return self.model.merge_and_unload()  # type: ignore[operator]

    def _by_file_name(self) -> dict[str, nn.Parameter]:
        return {
            name.replace(".modules_to_save.default.", ".").replace(".default.", "."): p
            for name, p in self.model.named_parameters()
            if ".lora_" in name or ".modules_to_save." in name
        }

    def _shape(self) -> dict[str, Any]:
        config = self.model.peft_config["default"]
        return {"r": config.r, "alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}  # type: ignore


def _key_dropout(model: nn.Module, p: float) -> None:
    """Put our dropout in the place of peft's, so that any cut of a step into micro-batches draws the same."""
    two_sides = bool(getattr(model, "config").is_encoder_decoder)  # noqa: B009 peft forwards it
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout["default"] = KeyedDropout(p, name, two_sides and bool(SOURCE_SIDE.search(name)))


def saved_shape(folder: Path) -> dict[str, Any]:
    """{"r", "alpha", "target_modules"} of a saved adapter. Raises CheckpointError if it cannot be read."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        return {"r": config["r"], "alpha": config["lora_alpha"], "target_modules": sorted(config["target_modules"])}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"'{folder.name}' is not a LoRA adapter: its {CONFIG} cannot be read.") from e


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))


def merge_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with a saved adapter folded into its weights, as a plain model again (load it in float32)."""
    saved_shape(folder)
    read_tensors(folder / WEIGHTS)  # peft would look for a pickle file if this one were missing
    with quiet():
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()  # type: ignore[arg-type,operator]
