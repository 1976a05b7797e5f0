"""Policy: the model as objectives see it, through quantities per target token or per row. Never [T, V] logits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tunewright.models import heads
from tunewright.models.layouts import LAYOUTS, PACKED, causal_lm, layout_of
from tunewright.models.recompute import set_checkpointing
from tunewright.ops import logprob
from tunewright.ops.logprob import Head, TileHead
from tunewright.ops.types import Batch


class Fast(Protocol):
    """Computes what Policy.hidden returns, sooner, and less where only some rows are wanted. head: the LM head for its
    kernels, if they serve it."""

    checkpointing: str
    head: TileHead | None

    @property
    def shares_prefixes(self) -> bool: ...

    def __call__(self, batch: Batch, rows: Tensor | None = None) -> Tensor: ...


class Teacher(Protocol):
    """What a divergence is measured against: another Policy, or something that computes the same two."""

    model: nn.Module

    def hidden(self, batch: Batch) -> Tensor: ...


class Policy:
    """model: a transformers model from load_model(), or a PeftModel around one.

    autocast: dtype of the products (bfloat16), or None to compute in the dtype of the weights.
    fast: computes what `hidden` returns, the same numbers sooner; None runs the model's own modules.
    embedding_noise: [T, D] for a batch that has noise keys, added to the input embeddings. The plain modules run then,
        because `fast` embeds the tokens itself.

    layout: `packed` or `padded`, how the model is run (models/layouts.py).
    A pass without gradient (validation, a reference) has neither dropout nor embedding noise.
    """

    def __init__(
        self,
        model: nn.Module,
        autocast: torch.dtype | None = None,
        *,
        fast: Fast | None = None,
        embedding_noise: Callable[[Batch], Tensor] | None = None,
    ) -> None:
        self.model = model
        self.autocast = autocast
        self.fast = fast
        self.embedding_noise = embedding_noise
        self.checkpointing = "none"
        self.layout = layout_of(model)
        for module in model.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                # peft would first copy every input to float32, only for autocast to bring it down again
                module.cast_input_dtype_enabled = autocast is None  # type: ignore[assignment]

    def set_checkpointing(self, choice: str) -> None:
        """Which layers are computed again in the backward: `none`, `selective` or `full`."""
        self.checkpointing = choice
        if self.fast is not None:
            self.fast.checkpointing = choice
        set_checkpointing(self.model, choice)

    @property
    def shares_prefixes(self) -> bool:
        """Whether a batch may hold segments that continue others (Batch.parent_S) without a slower way to run it."""
        return self.layout == PACKED and (self.fast is None or self.fast.shares_prefixes)

    @property
    def device(self) -> torch.device:
        """Where batches must be (`batch.to(policy.device)`)."""
        return next(self.model.parameters()).device

    def hidden(self, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """[T, D]: the last layer's output after the final norm, in the dtype of the computation. rows: [N, D] of these
        tokens only."""
        noisy = torch.is_grad_enabled() and batch.noise_T is not None and self.embedding_noise is not None
        with self._cast():
            if self.fast is not None and not noisy and (self.fast.shares_prefixes or bool((batch.parent_S < 0).all())):
                return self.fast(batch, rows)
            all_TD = LAYOUTS[self.layout](self.model, batch, self._inputs(batch, noisy))
            return all_TD if rows is None else all_TD[rows]

    def _inputs(self, batch: Batch, noisy: bool) -> dict[str, Tensor]:
        """The tokens [T], or their embeddings with the noise [T, D]."""
        if not noisy or self.embedding_noise is None:
            return {"input_ids": batch.tokens_T}
        embedded_TD = causal_lm(self.model).get_input_embeddings()(batch.tokens_T)  # type: ignore[operator]
        return {"inputs_embeds": embedded_TD + self.embedding_noise(batch).to(embedded_TD.dtype)}

    def scores(self, batch: Batch) -> Tensor:
        """[S, labels] float32: what the model's head says of each segment (models with a head for whole rows)."""
        with self._cast():
            noisy = self.embedding_noise is not None
            return heads.scores(self.model, batch, self.layout, self.hidden, noisy).float()

    def token_stats(
        self, batch: Batch, want: set[str], value: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """{name: [T] float32}, 0 where weights_T is 0: only supervised tokens reach the LM head.

        want: names from ops.logprob.STATS. value: a head that says one number of each hidden state before a token,
        [N, D] -> [N], as `value`; no gradient goes from it to the model.
        """
        rows = batch.weights_T.nonzero()[:, 0]
        h_ND = self.hidden(batch, rows)
        with self._cast():
            tiles = None if self.fast is None else self.fast.head
            stats = logprob.token_stats(h_ND, head_of(self.model), batch.targets_T[rows], want, tiles=tiles)
        if value is not None:
            stats["value"] = value(h_ND.detach())
        return {name: _spread(values, rows, batch.n_tokens) for name, values in stats.items()}

    def divergence(self, batch: Batch, teacher: Teacher, kind: str) -> Tensor:
        """[T] float32, 0 where weights_T is 0. kind: forward_kl, reverse_kl or jsd. No gradient to the teacher."""
        return self.compare(batch, teacher, {"divergence"}, kind)["divergence"]

    def compare(
        self,
        batch: Batch,
        teacher: Teacher,
        want: set[str],
        kind: str,
        beta: float = 0.5,
        temperature: float = 1.0,
    ) -> dict[str, Tensor]:
        """{name: [T] float32}, 0 where weights_T is 0: how far the teacher is, and statistics of one pass beside it.

        want, kind, beta, temperature: of ops.logprob.compare. Tokens that only one of both vocabularies has at its end
        (rows that fill a matrix up) do not count.
        """
        rows = batch.weights_T.nonzero()[:, 0]
        with torch.no_grad():
            teacher_h_ND = teacher.hidden(batch)[rows]
        h_ND = self.hidden(batch, rows)
        heads = head_of(self.model), head_of(teacher.model)
        own, other = (logprob.first_tokens(h, min(len(x.weight) for x in heads)) for h in heads)
        with self._cast():
            found = logprob.compare(
                h_ND, own, teacher_h_ND, other, batch.targets_T[rows], want, kind, beta, temperature
            )
        return {name: _spread(values, rows, batch.n_tokens) for name, values in found.items()}

    @torch.no_grad()
    def sample(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """[T] int64: where weights_T is not 0 a next token drawn from the model's own distribution, else the target."""
        rows = batch.weights_T.nonzero()[:, 0]
        h_ND, head = self.hidden(batch, rows), head_of(self.model)
        with self._cast():
            drawn = [
                torch.multinomial(head.logits(h).softmax(-1), 1, generator=generator)[:, 0]
                for h in h_ND.split(logprob.CHUNK)
            ]
        return batch.targets_T.index_copy(0, rows, torch.cat(drawn)) if drawn else batch.targets_T

    def computing(self) -> AbstractContextManager[Any]:
        """Within this the model's own modules, whoever runs them (the engine), compute in the policy's dtype."""
        return self._cast()

    def _cast(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)


def _spread(values_N: Tensor, rows_N: Tensor, n_tokens: int) -> Tensor:
    """[T] zeros with the values at their rows."""
    return torch.zeros(n_tokens, dtype=values_N.dtype, device=values_N.device).index_put((rows_N,), values_N)


def head_of(model: nn.Module) -> Head:
    """The LM head with the model's own scale and cap on the logits (Granite, Cohere, Gemma 2, Falcon-H1, T5)."""
    lm = causal_lm(model)
    linear = lm.get_output_embeddings()  # type: ignore[operator]
    config: Any = lm.config
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    tied_umt5 = config.model_type == "umt5" and config.tie_word_embeddings
    if getattr(config, "scale_decoder_outputs", False) or tied_umt5:
        divisor = config.d_model**0.5
    return Head(linear.weight, linear.bias, scale / divisor, getattr(config, "final_logit_softcapping", None))
