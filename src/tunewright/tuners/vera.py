"""VeRA: W x + b * B (d * A x) with frozen random A, B shared by all layers and trained vectors d, b (Kopiczko et al.
2023, arXiv 2310.11454, equation 2). peft inside.
"""

from __future__ import annotations

from typing import Any, ClassVar

from peft import VeraConfig
from pydantic import Field
from torch import Tensor, nn

from tunewright.tuners import base
from tunewright.tuners.base import TunerCard
from tunewright.tuners.peft_adapter import PeftTuner
from tunewright.tuners.targets import Dropout, Targets, full_names, target_fields


class VeRA(PeftTuner):
    """Two vectors a layer are trained: few numbers, so many variants take little room. A, B come from the seed and are
    saved, because another machine's generator could draw others."""

    class Options(base.Options):
        r: int = Field(256, ge=1, le=4096, description="rank of the shared random matrices; take it larger than LoRA's")
        d_initial: float = Field(0.1, gt=0, le=10, description="value at which the vector d starts; b starts at 0")
        dropout: Dropout = 0.0
        target_modules: Targets = "all-linear"

    card: ClassVar[TunerCard] = TunerCard(
        title="VeRA",
        artefact="adapter",
        mergeable=True,
        identity_at_start=True,
        works_on_nf4=True,
        default_lr=1e-2,
    )

    def config(self, model: nn.Module, seed: int) -> VeraConfig:
        o = self.options
        fields: dict[str, Any] = target_fields(model, o.target_modules, "vera")
        if fields.pop("exclude_modules"):  # peft's VeRA cannot exclude, so the layers are named one by one
            fields["target_modules"] = full_names(model, fields["target_modules"])
        return VeraConfig(
            r=o.r,
            d_initial=o.d_initial,
            vera_dropout=o.dropout,
            projection_prng_key=seed,
            save_projection=True,
            **fields,
        )

    def in_file(self) -> dict[str, Tensor]:
        model: Any = self.model.base_model
        shared = {"base_model.vera_A": model.vera_A["default"], "base_model.vera_B": model.vera_B["default"]}
        return {**super().in_file(), **shared}
