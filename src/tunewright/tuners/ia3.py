"""IA3: trained factors on keys, values and the inner activations of the MLP (Liu et al. 2022, arXiv 2205.05638, section
3.3). peft inside.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from peft import IA3Config
from peft.utils import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from pydantic import Field
from torch import nn

from tunewright.core.errors import SpecError
from tunewright.tuners import base
from tunewright.tuners.base import TunerCard
from tunewright.tuners.peft_adapter import PeftTuner
from tunewright.tuners.targets import linear_layers, target_fields

# for a model type that peft has no row for: keys, values and the MLP's last layer by their usual names
USUAL = (["k_proj", "v_proj", "down_proj"], ["down_proj"])


class IA3(PeftTuner):
    """One number for each key, value and inner activation, starting at 1: the smallest adapter of all."""

    class Options(base.Options):
        target_modules: Literal["auto"] | list[str] = Field(
            "auto", description="names of linear layers that are scaled; auto: keys, values and the MLP's last layer"
        )
        feedforward_modules: Literal["auto"] | list[str] = Field(
            "auto", description="those of them whose inputs are scaled instead of their outputs; auto: the MLP's"
        )

    card: ClassVar[TunerCard] = TunerCard(
        title="IA3",
        artefact="adapter",
        mergeable=True,
        identity_at_start=True,
        works_on_nf4=True,
        default_lr=1e-2,
    )

    def config(self, model: nn.Module, seed: int) -> IA3Config:
        targets, inner = self._layers(model)
        fields = target_fields(model, targets, "ia3")
        return IA3Config(feedforward_modules=inner, **fields)

    def _layers(self, model: Any) -> tuple[list[str], list[str]]:
        """(target_modules, feedforward_modules). Raises SpecError if the second holds what the first has not."""
        o, kind = self.options, model.config.model_type
        targets = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind, USUAL[0])
        inner = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind, USUAL[1])
        if o.target_modules != "auto":
            targets, inner = o.target_modules, [name for name in inner if name in o.target_modules]
        elif not all(any(name.endswith(t) for name in linear_layers(model)) for t in targets):
            raise SpecError(
                f"tuner 'ia3' does not know which layers of a model of type '{kind}' are keys, values and MLP. Name "
                "them in target_modules, and in feedforward_modules those whose inputs are to be scaled.",
                param="tuner",
            )
        if o.feedforward_modules != "auto":
            inner = o.feedforward_modules
        odd = sorted(set(inner) - set(targets))
        if odd:
            raise SpecError(
                f"tuner 'ia3', option feedforward_modules: '{odd[0]}' is not in target_modules "
                f"({', '.join(sorted(targets))}). Name it there, too.",
                param="tuner",
            )
        return list(targets), list(inner)
