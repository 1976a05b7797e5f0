"""Prompt tuning: trained embeddings of virtual tokens in front of the text (Lester et al. 2021, arXiv 2104.08691,
section 2). peft's encoder.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft import PromptTuningConfig
from torch import nn

from tunewright.tuners import base
from tunewright.tuners.base import TunerCard
from tunewright.tuners.soft import InitText, SoftPrompt, VirtualTokens, fields, first_tokens


class PromptTuning(SoftPrompt):
    """Virtual tokens in front of each row, trained as embeddings; they start as those of real tokens.

    Learning rate: peft's own examples of prompt tuning use 3e-2 for AdamW, three times of this; the paper's 0.3 is for
    Adafactor's relative steps.
    """

    class Options(base.Options):
        virtual_tokens: VirtualTokens = 20
        init_text: InitText = None

    card: ClassVar[TunerCard] = TunerCard(
        title="Prompt tuning",
        artefact="adapter",
        mergeable=False,
        identity_at_start=False,
        works_on_nf4=True,
        default_lr=1e-2,
    )

    def config(self, model: nn.Module, seed: int) -> PromptTuningConfig:
        return PromptTuningConfig(**fields(model, self.options, "prompt"))

    def attach(self, model: nn.Module, seed: int) -> nn.Module:
        """Raises SpecError for a model that it is not for, and for a text without tokens."""
        wrapped = super().attach(model, seed)
        lm: Any = model
        tokens_N = first_tokens(lm, self.options, seed).to(lm.device)
        with torch.no_grad():
            self.encoder.embedding.weight.copy_(lm.get_input_embeddings()(tokens_N))
        return wrapped
