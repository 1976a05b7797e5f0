"""OFT: W R x with a trained block-diagonal rotation R = (I + Q)(I - Q)^-1 of the inputs, Q skew (Qiu et al. 2023,
arXiv 2306.07280, section 3; on the inputs and with a Neumann series for the inverse: arXiv 2506.19847). peft inside.
"""

from __future__ import annotations

from typing import ClassVar

from peft import OFTConfig
from pydantic import Field
from torch import nn

from tunewright.core.errors import SpecError
from tunewright.tuners import base
from tunewright.tuners.base import TunerCard
from tunewright.tuners.peft_adapter import PeftTuner
from tunewright.tuners.targets import Targets, target_fields


class OFT(PeftTuner):
    """Rotates what a layer reads, block by block; lengths and angles between neurons stay. Q starts at zero."""

    class Options(base.Options):
        block_size: int = Field(
            32, ge=2, le=1024, description="inputs that are rotated together; the nearest divisor of a layer's inputs"
        )
        exact: bool = Field(
            False, description="solve for the rotation exactly instead of by a series of five terms; slower"
        )
        target_modules: Targets = "all-linear"

    card: ClassVar[TunerCard] = TunerCard(
        title="OFT",
        artefact="adapter",
        mergeable=True,
        identity_at_start=True,
        works_on_nf4=True,
        default_lr=2e-3,
    )

    def config(self, model: nn.Module, seed: int) -> OFTConfig:
        o = self.options
        fields = target_fields(model, o.target_modules, "oft")
        if fields["fan_in_fan_out"]:
            raise SpecError(
                "tuner 'oft' cannot rotate this model's layers: their weights are transposed (GPT-2's Conv1D), which "
                "peft's OFT does not know. Use the tuner 'lora', 'dora' or 'ia3'.",
                param="tuner",
            )
        return OFTConfig(oft_block_size=o.block_size, use_cayley_neumann=not o.exact, **fields)
