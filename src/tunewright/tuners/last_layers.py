"""The last k layers are trained, the rest stays as it is."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import nn

from tunewright.core.errors import SpecError
from tunewright.tuners import base
from tunewright.tuners.base import TunerCard
from tunewright.tuners.blocks import main_stack
from tunewright.tuners.whole_tensors import WholeTensors


class LastLayers(WholeTensors):
    """All weights of the last layers; of an encoder-decoder, of its decoder. No gradient goes further down."""

    class Options(base.Options):
        layers: int = Field(2, ge=1, le=1000, description="how many of the last layers are trained")

    card: ClassVar[TunerCard] = TunerCard(
        title="Last layers",
        artefact="delta",
        mergeable=True,
        identity_at_start=True,
        works_on_nf4=False,
        default_lr=1e-4,
    )

    def choose(self, model: nn.Module) -> list[str]:
        """Raises SpecError if the model has fewer layers."""
        blocks, k = main_stack(model), self.options.layers
        if k > len(blocks):
            raise SpecError(
                f"tuner 'last_layers', option layers is {k}, but the model has {len(blocks)} layers. "
                f"Use 1 to {len(blocks)}.",
                param="tuner",
            )
        return [f"{path}.{name}" for path, layer in blocks[-k:] for name, _ in layer.named_parameters()]
