"""rsLoRA: LoRA whose update is scaled by alpha / sqrt(r), so that high ranks learn, too (Kalajdzievski 2023, arXiv
2312.03732). peft inside; the file is a LoRA adapter with use_rslora set.
"""

from __future__ import annotations

from typing import ClassVar

from peft import LoraConfig
from pydantic import Field
from torch import nn

from tunewright.tuners import base
from tunewright.tuners.base import TunerCard
from tunewright.tuners.peft_adapter import PeftTuner
from tunewright.tuners.targets import Dropout, Experts, Targets, lora_config


class RankStabilisedLoRA(PeftTuner):
    """LoRA that keeps the size of its steps when the rank grows. At the defaults the scale is that of LoRA's, 2."""

    class Options(base.Options):
        r: int = Field(64, ge=1, le=1024, description="rank of the update")
        alpha: int = Field(16, ge=1, le=65536, description="the update's scale is alpha / sqrt(r)")
        dropout: Dropout = 0.0
        target_modules: Targets = "all-linear"
        experts: Experts = False

    card: ClassVar[TunerCard] = TunerCard(
        title="rsLoRA",
        artefact="adapter",
        mergeable=True,
        identity_at_start=True,
        works_on_nf4=True,
        default_lr=1e-3,
    )

    def config(self, model: nn.Module, seed: int) -> LoraConfig:
        return lora_config(self.options, model, "rslora", use_rslora=True)
