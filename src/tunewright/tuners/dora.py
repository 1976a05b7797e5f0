"""DoRA: each output's weights as a trained length times a direction that LoRA changes,
W' = m (W + s B A) / ||W + s B A||, norms by row (Liu et al. 2024, arXiv 2402.09353, equation 5; the norm gets no
gradient, section 4.3). peft inside.
"""

from __future__ import annotations

from typing import ClassVar

from peft import LoraConfig
from pydantic import Field
from torch import nn

from tunewright.tuners import base
from tunewright.tuners.base import TunerCard
from tunewright.tuners.peft_adapter import PeftTuner
from tunewright.tuners.targets import Dropout, Targets, target_fields


class DoRA(PeftTuner):
    """LoRA for the direction of each row of the weights and one trained number for its length."""

    class Options(base.Options):
        r: int = Field(16, ge=1, le=1024, description="rank of the update of the directions")
        alpha: int = Field(32, ge=1, le=65536, description="that update's scale is alpha / r")
        dropout: Dropout = 0.0
        target_modules: Targets = "all-linear"

    card: ClassVar[TunerCard] = TunerCard(
        title="DoRA",
        artefact="adapter",
        mergeable=True,
        identity_at_start=True,
        works_on_nf4=True,
        default_lr=1e-3,
    )

    def config(self, model: nn.Module, seed: int) -> LoraConfig:
        o = self.options
        fields = target_fields(model, o.target_modules, "dora")
        return LoraConfig(r=o.r, lora_alpha=o.alpha, lora_dropout=o.dropout, bias="none", use_dora=True, **fields)
