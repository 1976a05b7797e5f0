"""Prefix tuning: trained keys and values in front of the text's own, in every layer (Li and Liang 2021, arXiv
2101.00190, section 4.2). peft's encoder.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft import PrefixTuningConfig
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import DynamicCache

from tunewright.core.errors import SpecError
from tunewright.ops.runtime import quiet
from tunewright.tuners import base
from tunewright.tuners.base import TunerCard
from tunewright.tuners.soft import InitText, SoftPrompt, VirtualTokens, fields, first_tokens


class PrefixTuning(SoftPrompt):
    """Keys and values that every token of a row sees; they start as those of real tokens (section 7.4 of the paper).

    With `projection` an MLP says them (section 4.3), starting at random. Learning rate: that of peft's examples (1e-2).
    """

    class Options(base.Options):
        virtual_tokens: VirtualTokens = 20
        init_text: InitText = None
        projection: bool = Field(False, description="an MLP says the keys and values; it is not served")
        hidden_size: int = Field(512, ge=1, le=16384, description="width of that MLP; the paper: 512 to 800")

        @model_validator(mode="after")
        def _check(self) -> PrefixTuning.Options:
            if self.projection and self.init_text is not None:
                raise ValueError("with projection the start is random, so init_text has no effect; leave one out")
            return self

    card: ClassVar[TunerCard] = TunerCard(
        title="Prefix tuning",
        artefact="adapter",
        mergeable=False,
        identity_at_start=False,
        works_on_nf4=True,
        default_lr=1e-2,
    )

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.keeps_encoder = options.projection

    def config(self, model: nn.Module, seed: int) -> PrefixTuningConfig:
        o = self.options
        more = {"encoder_hidden_size": o.hidden_size} if o.projection else {}
        return PrefixTuningConfig(prefix_projection=o.projection, **more, **fields(model, o, "prefix"))

    def attach(self, model: nn.Module, seed: int) -> nn.Module:
        """Raises SpecError for a model that it is not for, and for a text without tokens."""
        wrapped: Any = super().attach(model, seed)
        config = wrapped.peft_config["default"]
        tokens_N = first_tokens(model, self.options, seed)
        start_NC = keys_and_values(model, tokens_N, 2 * config.num_layers * config.token_dim)
        if not self.options.projection:
            self.encoder.load_prompt_embeddings(start_NC.float())
        return wrapped


@torch.no_grad()
def keys_and_values(model: Any, tokens_N: Tensor, width: int) -> Tensor:
    """[N, layers * 2 * heads * K]: what the model would keep of the tokens, laid out as peft has it in its file.

    width: what peft expects. Raises SpecError if the model does not keep keys and values of one shape in all layers.
    """
    cache = DynamicCache()  # without the config, which would let layers with a window forget
    was = model.training
    model.train()  # in eval mode bitsandbytes would repack 4-bit weights for inference, and give no gradients any more
    with quiet():
        model(input_ids=tokens_N[None].to(model.device), past_key_values=cache, use_cache=True)
    model.train(was)
    kept = [getattr(layer, kind, None) for layer in cache.layers for kind in ("keys", "values")]
    found = [x for x in kept if x is not None]
    is_uniform = len(found) == len(kept) and len({x.shape for x in found}) == 1
    if not is_uniform or sum(x.numel() for x in found) != width * len(tokens_N):
        raise SpecError(
            f"tuner 'prefix' cannot be used with a {type(model).__name__}: its layers do not all keep keys and values "
            "of one shape. Use prompt, p_tuning or lora.",
            param="tuner",
        )
    flat = torch.stack([x[0] for x in found])  # [layers * 2, H, N, K]
    return flat.permute(2, 0, 1, 3).reshape(len(tokens_N), width)
