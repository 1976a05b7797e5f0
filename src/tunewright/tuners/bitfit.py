"""BitFit: only the biases are trained (Ben Zaken et al. 2022, arXiv 2106.10199)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from tunewright.core.errors import SpecError, UserError
from tunewright.ops.quant import dequantise
from tunewright.tuners import base
from tunewright.tuners.base import TunerCard
from tunewright.tuners.targets import linear_layers
from tunewright.tuners.whole_tensors import WholeTensors

# flags of a config under which transformers builds the model with biases in all its linear layers
BIAS_FLAGS = ("attention_bias", "mlp_bias")


class BitFit(WholeTensors):
    """Every bias is trained, those of norms included. Most language models have few or none; zeros can be added."""

    class Options(base.Options):
        add_biases: bool = Field(
            False, description="give each linear layer without a bias one of zeros (not the LM head)"
        )

    card: ClassVar[TunerCard] = TunerCard(
        title="BitFit",
        artefact="delta",
        mergeable=True,
        identity_at_start=True,
        works_on_nf4=True,
        default_lr=2e-3,
    )

    def choose(self, model: nn.Module) -> list[str]:
        names = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"]
        if not names:
            raise SpecError(
                f"tuner 'bitfit' trains biases, and this model ({type(model).__name__}) has none. Use tuner: {{name: "
                "bitfit, add_biases: true}, which gives its linear layers biases of zero, or another tuner, e.g. lora.",
                param="tuner",
            )
        return names

    def add(self, model: nn.Module) -> list[str]:
        if not self.options.add_biases:
            return []
        bare = {n: m for n, m in linear_layers(model).items() if isinstance(m, nn.Linear) and m.bias is None}
        for layer in bare.values():
            layer.bias = nn.Parameter(torch.zeros(layer.out_features, device=layer.weight.device))
        return [f"{name}.bias" for name in bare]

    def merge(self) -> nn.Module:
        """Raises UserError where transformers could not open the model again, because its class has no such biases."""
        config: Any = self.model.config
        if self._added and not all(hasattr(config, flag) for flag in BIAS_FLAGS):
            raise UserError(
                f"Models of type '{config.model_type}' have no place for the added biases, so they cannot be folded "
                "into a plain model folder. Keep the delta over its base.",
                param="tuner",
            )
        for flag in BIAS_FLAGS if self._added else ():
            setattr(config, flag, True)
        return dequantise(self.model)
