"""DoRA: each output's weights as a trained length times a direction that LoRA changes,
W' = m (W + s B A) / ||W + s B A||, norms by row (Liu et al. 2024, arXiv 2402.09353, equation 5; the norm gets no
gradient, section 4.3). peft inside.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.dora import DoraLinearLayer
from pydantic import Field
from torch import Tensor, nn

from tunewright.tuners import base
from tunewright.tuners.base import TunerCard
from tunewright.tuners.peft_adapter import PeftTuner
from tunewright.tuners.targets import Dropout, Targets, lora_config


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
        return lora_config(self.options, model, "dora", use_dora=True)

    def attach(self, model: nn.Module, seed: int) -> nn.Module:
        wrapped = super().attach(model, seed)
        for module in list(wrapped.modules()):
            if getattr(module, "lora_magnitude_vector", None):
                vectors: Any = module.lora_magnitude_vector
                vectors["default"] = Magnitude(vectors["default"].fan_in_fan_out, module.get_base_layer())  # type: ignore
        return wrapped


class Magnitude(DoraLinearLayer):
    """peft's part of a layer without ever making B A: by row,
    ||W + s B A||^2 = ||W||^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B, and the first term never changes."""

    def __init__(self, fan_in_fan_out: bool, base_layer: nn.Module) -> None:
        super().__init__(fan_in_fan_out)
        self.square = self._weight(base_layer).float().square().sum(1)
        self.weight = nn.Parameter(self.square.sqrt())

    def _weight(self, base_layer: nn.Module) -> Tensor:
        """[out, in]"""
        weight: Any = base_layer.weight.detach()  # type: ignore[union-attr,operator]
        return weight.T if self.fan_in_fan_out else weight

    @torch.no_grad()
    def norm(self, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """[out] float32: the lengths of the rows of W + s B A."""
        cross = ((weight @ a.T.to(weight.dtype)) * b).sum(1)
        own = ((b @ (a @ a.T)) * b).sum(1)
        return (self.square + 2 * scale * cross.float() + scale**2 * own.float()).clamp_min(0).sqrt()

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Module,
        lora_B: nn.Module,
        scaling: float,
        base_layer: nn.Module,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """What is added to the base's output [..., out] (bias included, where base_result has it)."""
        weight: Any = self._weight(base_layer)
        a, b = lora_A.weight, lora_B.weight
        factor = self.weight / self.norm(weight, a, b, scaling)  # type: ignore[arg-type]
        update = lora_B(lora_A(x))
        if base_result is None:
            base_result = F.linear(x, weight)
        elif base_layer.bias is not None:
            base_result = base_result - base_layer.bias  # type: ignore[operator]
        return (factor - 1).to(update.dtype) * base_result + (factor * scaling).to(update.dtype) * update
