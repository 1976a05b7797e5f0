"""Policy: a causal language model as objectives see it, through quantities per target token. Never [T, V] logits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tunewright.ops import logprob
from tunewright.ops.logprob import Head
from tunewright.ops.types import Batch


class Policy:
    """model: a transformers causal LM from load_model(), or a PeftModel around one.

    autocast: dtype of the products (bfloat16), or None to compute in the dtype of the weights.
    fast: computes what `hidden` returns, the same numbers sooner; None runs the model's own modules.
    embedding_noise: [T, D] for a batch, added to the input embeddings while the model is in training mode. The plain
        modules run then, because `fast` embeds the tokens itself.
    """

    def __init__(
        self,
        model: nn.Module,
        autocast: torch.dtype | None = None,
        *,
        fast: Callable[[Batch], Tensor] | None = None,
        embedding_noise: Callable[[Batch], Tensor] | None = None,
    ) -> None:
        self.model = model
        self.autocast = autocast
        self.fast = fast
        self.embedding_noise = embedding_noise
        for module in model.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                # peft would first copy every input to float32, only for autocast to bring it down again
                module.cast_input_dtype_enabled = autocast is None  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:
        """Where batches must be (`batch.to(policy.device)`)."""
        return next(self.model.parameters()).device

    def hidden(self, batch: Batch) -> Tensor:
        """[T, D]: the last layer's output after the final norm, in the dtype of the computation."""
        noisy = self.embedding_noise is not None and self.model.training
        with self._cast():
            if self.fast is not None and not noisy:
                return self.fast(batch)
            out = decoder_of(self.model)(
                **self._inputs(batch, noisy),
                position_ids=batch.position_T[None],
                cu_seqlens=batch.cu_seqlens.tolist(),
                use_cache=False,
            )
        return out.last_hidden_state[0]

    def _inputs(self, batch: Batch, noisy: bool) -> dict[str, Tensor]:
        """The tokens, or their embeddings with the noise."""
        if not noisy or self.embedding_noise is None:
            return {"input_ids": batch.tokens_T[None]}
        embedded_TD = causal_lm(self.model).get_input_embeddings()(batch.tokens_T)  # type: ignore[operator]
        return {"inputs_embeds": (embedded_TD + self.embedding_noise(batch).to(embedded_TD.dtype))[None]}

    def token_stats(self, batch: Batch, want: set[str]) -> dict[str, Tensor]:
        """{name: [T] float32}, 0 where weights_T is 0: only supervised tokens reach the LM head.

        want: names from ops.logprob.STATS.
        """
        rows = batch.weights_T.nonzero()[:, 0]
        h_ND = self.hidden(batch)[rows]
        with self._cast():
            stats = logprob.token_stats(h_ND, head_of(self.model), batch.targets_T[rows], want)
        return {name: _spread(values, rows, batch.n_tokens) for name, values in stats.items()}

    def divergence(self, batch: Batch, teacher: Policy, kind: str) -> Tensor:
        """[T] float32, 0 where weights_T is 0. kind: forward_kl, reverse_kl or jsd. No gradient to the teacher."""
        rows = batch.weights_T.nonzero()[:, 0]
        with torch.no_grad():
            teacher_h_ND = teacher.hidden(batch)[rows]
        h_ND = self.hidden(batch)[rows]
        with self._cast():
            values = logprob.divergence(h_ND, head_of(self.model), teacher_h_ND, head_of(teacher.model), kind)
        return _spread(values, rows, batch.n_tokens)

    def _cast(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)


def _spread(values_N: Tensor, rows_N: Tensor, n_tokens: int) -> Tensor:
    """[T] zeros with the values at their rows."""
    return torch.zeros(n_tokens, dtype=values_N.dtype, device=values_N.device).index_put((rows_N,), values_N)


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model below any peft wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of the model that turns tokens into hidden states."""
    lm = causal_lm(model)
    return getattr(lm, lm.base_model_prefix)  # type: ignore[arg-type]


def head_of(model: nn.Module) -> Head:
    """The LM head with the model's own scale and cap on the logits (Granite, Cohere, Gemma 2, Falcon-H1)."""
    lm = causal_lm(model)
    linear = lm.get_output_embeddings()  # type: ignore[operator]
    config: Any = lm.config
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return Head(linear.weight, linear.bias, scale / divisor, getattr(config, "final_logit_softcapping", None))
