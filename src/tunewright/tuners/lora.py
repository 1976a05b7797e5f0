"""LoRA: W x + (alpha / r) B A x with trained A, B and frozen W (Hu et al. 2021, arXiv 2106.09685). peft inside."""

from __future__ import annotations

from typing import ClassVar

from peft import LoraConfig
from pydantic import Field
from torch import nn

from tunewright.tuners import base
from tunewright.tuners.base import TunerCard
from tunewright.tuners.peft_adapter import PeftTuner
from tunewright.tuners.targets import Dropout, Experts, Targets, lora_config


class LoRA(PeftTuner):
    """A starts random (from the seed), B at zero, so the model starts exactly as the base. A and B are float32."""

    class Options(base.Options):
        r: int = Field(16, ge=1, le=1024, description="rank of the update")
        alpha: int = Field(32, ge=1, le=65536, description="the update's scale is alpha / r")
        dropout: Dropout = 0.0
        target_modules: Targets = "all-linear"
        experts: Experts = False

    card: ClassVar[TunerCard] = TunerCard(
        title="LoRA",
        artefact="adapter",
        mergeable=True,
        identity_at_start=True,
        works_on_nf4=True,
        default_lr=1e-3,
    )

    def config(self, model: nn.Module, seed: int) -> LoraConfig:
        return lora_config(self.options, model, "lora")
