"""Mixture of experts: where a model's routers are, and what they say while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunewright.core.errors import SpecError
from tunewright.models.layouts import causal_lm, decoder_of


class Routers:
    """The routers of a model, one a layer that has experts. n: how many. chosen: how many experts a token gets.

    Raises SpecError for a model whose router logits transformers does not know how to record.
    """

    def __init__(self, model: nn.Module) -> None:
        lm: Any = causal_lm(model)
        recorder = (getattr(decoder_of(model), "_can_record_outputs", None) or {}).get("router_logits")
        kind = getattr(recorder, "target_class", recorder)
        found = [m for m in lm.modules() if kind is not None and isinstance(m, kind)]
        if not found:
            raise SpecError(
                f"router_loss is for a mixture of experts, and a {type(lm).__name__} has no routers that transformers "
                "records. Set it to 0.",
                param="router_loss",
            )
        config: Any = lm.config
        self.n = len(found)
        self.chosen = int(getattr(found[0], "top_k", None) or config.num_experts_per_tok)
        self._place = getattr(recorder, "index", 0)
        self._seen: list[Tensor] | None = None
        self._with_grad = False
        for module in found:
            module.register_forward_hook(self._record)

    @contextmanager
    def watched(self) -> Iterator[list[Tensor]]:
        """[T, experts] logits of each layer, filled by the first forward within the block that has gradients where the
        block is entered with gradients, and none where it has not."""
        self._seen, self._with_grad = [], torch.is_grad_enabled()
        try:
            yield self._seen
        finally:
            self._seen = None

    def _record(self, module: nn.Module, args: Any, output: Any) -> None:
        # a layer that is computed again in the backward comes by when nobody watches
        if self._seen is None or len(self._seen) == self.n or torch.is_grad_enabled() != self._with_grad:
            return
        logits = output[self._place] if isinstance(output, tuple) else output
        self._seen.append(logits.reshape(-1, logits.shape[-1]))
