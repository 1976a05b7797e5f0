"""P-tuning: a small network says the embeddings of the virtual tokens (Liu et al. 2021, arXiv 2103.10385, section 3.1:
"GPT understands, too"). peft's encoder.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from peft import PromptEncoderConfig
from pydantic import Field
from torch import nn

from tunewright.tuners import base
from tunewright.tuners.base import TunerCard
from tunewright.tuners.soft import SoftPrompt, VirtualTokens, fields


class PTuning(SoftPrompt):
    """Virtual tokens in front of each row, said by a trained MLP or LSTM. Served without it: its output is in the file.

    Learning rate: that of peft's examples of P-tuning (1e-3); what is trained is a network and not embeddings.
    """

    class Options(base.Options):
        virtual_tokens: VirtualTokens = 20
        encoder: Literal["mlp", "lstm"] = Field("mlp", description="the network; the paper: a two-way LSTM and an MLP")
        hidden_size: int | None = Field(None, ge=1, le=16384, description="its width; empty: the model's")
        layers: int = Field(2, ge=1, le=8, description="of the LSTM; the MLP has three always")

    card: ClassVar[TunerCard] = TunerCard(
        title="P-tuning",
        artefact="adapter",
        mergeable=False,
        identity_at_start=False,
        works_on_nf4=True,
        default_lr=1e-3,
    )
    keeps_encoder = True

    def config(self, model: nn.Module, seed: int) -> PromptEncoderConfig:
        o = self.options
        return PromptEncoderConfig(
            encoder_reparameterization_type=o.encoder.upper(),
            encoder_hidden_size=o.hidden_size,
            encoder_num_layers=o.layers if o.encoder == "lstm" else 2,  # what peft says of its MLP
            **fields(model, o, "p_tuning"),
        )
