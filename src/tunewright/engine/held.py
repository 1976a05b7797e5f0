"""An engine over a model that somebody else holds and goes on changing: a training job's own weights, no second copy.

The model's modules run as they are, adapters included, or its fast path does, over the same weights; only the attention
is the engine's for as long as it serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tunewright.core.home import Home
from tunewright.data.tokenizer import Tokenizer
from tunewright.engine import attention, linear
from tunewright.engine.artefacts import Artefacts, Model, Target
from tunewright.engine.engine import Engine
from tunewright.engine.kv_cache import KVCache
from tunewright.engine.scheduler import Limits
from tunewright.models.fast_llama import FastLlama
from tunewright.models.layouts import causal_lm, use_attention
from tunewright.models.policy import Fast, head_of

NAME = "held"


class FastNet:
    """A model on its fast path, called as the engine calls a model's modules."""

    def __init__(self, fast: FastLlama, model: nn.Module) -> None:
        self.fast, self.parameters, self.head = fast, model.parameters, head_of(model)

    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, use_cache: bool, logits_to_keep: Tensor, kv: attention.StepPlan
    ) -> Any:
        scale, window = self.fast.shape.hd**-0.5, self.fast.shape.window

        def attend(layer: int, q_HTK: Tensor, k_HTK: Tensor, v_HTK: Tensor) -> Tensor:
            return attention.attend(kv, layer, q_HTK, k_HTK, v_HTK, scale, window)

        h_ND = self.fast.serve(input_ids[0], position_ids[0], logits_to_keep, attend)
        return SimpleNamespace(logits=self.head.logits(h_ND)[None])


class Held(Artefacts):
    """The one model, whatever a request names."""

    def __init__(self, home: Home, net: Any, tokenizer: Tokenizer, context: int, limits: Limits) -> None:
        super().__init__(home, next(net.parameters()).dtype, limits)
        self._only = Target(Path(NAME), NAME, None, "", False, tokenizer, context, 0, {})
        self.models[NAME] = Model(net, linear.Routing(), KVCache(context), None)

    def resolve(self, base: str | None, artefact: str | None) -> Target:
        return self._only

    def acquire(self, target: Target) -> Model | None:
        return self.models[NAME]

    def release(self, model: Model, target: Target) -> None:
        """It stays."""

    def unload(self, folder: str | None = None) -> int:
        return 0


def engine_over(
    model: nn.Module, tokenizer: Tokenizer, context: int, home: Home, limits: Limits, fast: Fast | None = None
) -> Engine:
    """An engine whose requests name NAME as their base. model: from load_model(), perhaps under peft; it must run
    packed. context: tokens that fit. fast: the model's fast path, which then computes all but the attention. Step it
    only within serving(model)."""
    net = FastNet(fast, model) if isinstance(fast, FastLlama) else causal_lm(model)
    held = Held(home, net, tokenizer, context, limits)
    return Engine(home, dtype="float32", threads=torch.get_num_threads(), limits=limits, artefacts=held)


@contextmanager
def serving(model: nn.Module) -> Iterator[None]:
    """Within this the model answers: its attention is the engine's, and no layer is in training."""
    config: Any = causal_lm(model).config
    before, trained = config._attn_implementation, model.training
    use_attention(model, attention.register())
    model.eval()
    try:
        yield
    finally:
        use_attention(model, before)
        model.train(trained)
