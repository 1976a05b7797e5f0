"""LoRA: W x + (alpha / r) B A x with trained A, B and frozen W (Hu et al. 2021, arXiv 2106.09685). peft inside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field
from safetensors.torch import save_file
from torch import nn

from tunewright.core.errors import CheckpointError, SpecError, did_you_mean
from tunewright.ops.runtime import quiet
from tunewright.tuners import base
from tunewright.tuners.base import TunerCard
from tunewright.tuners.files import copy_into, read_tensors

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


class LoRA(base.Tuner):
    """A starts random (from the seed), B at zero, so the model starts exactly as the base. A and B are float32."""

    class Options(base.Options):
        """r: rank of the update. alpha: its scale is alpha / r. target_modules: names of linear layers, or all-linear
        (every linear layer of the blocks, not the LM head)."""

        r: int = Field(16, ge=1, le=1024)
        alpha: int = Field(32, ge=1, le=65536)
        target_modules: Literal["all-linear"] | list[str] = "all-linear"

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
            target_modules=_targets(model, o.target_modules),
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(), quiet():
            torch.manual_seed(seed)
            self.model = get_peft_model(model, config)  # type: ignore[arg-type,assignment]
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
        return {name.replace(".default.", "."): p for name, p in self.model.named_parameters() if ".lora_" in name}

    def _shape(self) -> dict[str, Any]:
        config = self.model.peft_config["default"]
        return {"r": config.r, "alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}  # type: ignore


def saved_shape(folder: Path) -> dict[str, Any]:
    """{"r", "alpha", "target_modules"} of a saved adapter. Raises CheckpointError if it cannot be read."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        return {"r": config["r"], "alpha": config["lora_alpha"], "target_modules": sorted(config["target_modules"])}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"'{folder.name}' is not a LoRA adapter: its {CONFIG} cannot be read.") from e


def _targets(model: nn.Module, wanted: str | list[str]) -> list[str]:
    """The names of the linear layers to adapt, all of which the model has."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    names = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    leaves = sorted({n.rpartition(".")[2] for n in names})
    for target in [] if wanted == "all-linear" else wanted:
        if not any(n == target or n.endswith(f".{target}") for n in names):
            raise SpecError(
                f"tuner 'lora', option target_modules: the model has no linear layer '{target}' that can be adapted."
                f"{did_you_mean(target, leaves)} It has: {', '.join(leaves)}.",
                param="tuner",
            )
    return leaves if isinstance(wanted, str) else sorted(wanted)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))


def merge_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with a saved adapter folded into its weights, as a plain model again (load it in float32)."""
    saved_shape(folder)
    read_tensors(folder / WEIGHTS)  # peft would look for a pickle file if this one were missing
    with quiet():
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()  # type: ignore[arg-type,operator]
