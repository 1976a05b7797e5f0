"""Two ways to run a transformers model over a Batch: `packed` and `padded`. The same numbers.

packed: all segments in one row; position ids and our attention keep them apart. Nothing is computed for padding.
padded: segments of similar length as the rows of a batch with an attention mask, as everybody does it; for models whose
attention does not go through transformers' attention interface, and for encoder-decoders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunewright.ops import attention
from tunewright.ops.noise import set_keys, source_keys
from tunewright.ops.padding import buckets, pad, real, unpad
from tunewright.ops.types import Batch
from tunewright.ops.virtual import Virtual, insert_rows

PACKED, PADDED = "packed", "padded"


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model below any peft wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of the model that turns tokens into hidden states (of an encoder-decoder: its decoder)."""
    lm: Any = causal_lm(model)
    return lm.get_decoder() if lm.config.is_encoder_decoder else getattr(lm, lm.base_model_prefix)


def layout_of(model: nn.Module) -> str:
    """How the model is run: packed if it uses our attention, else padded."""
    config: Any = causal_lm(model).config
    return PACKED if config._attn_implementation == attention.NAME else PADDED


def use_attention(model: nn.Module, name: str) -> None:
    """Let the model use this attention implementation: `tunewright` (it then runs packed) or one of transformers'."""
    # not set_attn_implementation: on a model with an attention of its own it only logs a warning, and the masks that
    # transformers builds for such a model depend on the name, too
    for module in causal_lm(model).modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = name


def virtual_of(model: nn.Module) -> Virtual | None:
    """What a soft prompt puts in front of each segment, from peft's encoder of it; None where there is none, or off."""
    peft_model: Any = model
    if getattr(model, "prompt_encoder", None) is None or peft_model._adapters_disabled:
        return None
    n, made = peft_model.active_peft_config.num_virtual_tokens, peft_model.get_prompt(batch_size=1)
    if isinstance(made, Tensor):  # [1, N, D], else a cache
        return Virtual(n, rows_ND=made[0])
    return Virtual(n, layers=tuple((layer.keys, layer.values) for layer in made.layers))


def packed(model: nn.Module, batch: Batch, inputs: dict[str, Tensor]) -> Tensor:
    """[T, D]. inputs: {"input_ids": [T]} or {"inputs_embeds": [T, D]}. A soft prompt goes before each segment."""
    virtual = virtual_of(model)
    if virtual is None or virtual.rows_ND is None:
        return _run_packed(model, batch, inputs, virtual)
    embeddings: Any = causal_lm(model).get_input_embeddings()  # type: ignore[operator]
    embedded_TD = inputs["inputs_embeds"] if "inputs_embeds" in inputs else embeddings(inputs["input_ids"])
    grown, embedded_RD, at_T = insert_rows(batch, virtual.rows_ND, embedded_TD)
    return _run_packed(model, grown, {"inputs_embeds": embedded_RD}, None)[at_T]


def _run_packed(model: nn.Module, batch: Batch, inputs: dict[str, Tensor], virtual: Virtual | None) -> Tensor:
    """[T, D]. virtual: keys and values that every segment sees before its own, or None."""
    given: dict[str, Any] = {name: values[None] for name, values in inputs.items()}
    position_T = batch.position_T
    if batch.types_T is not None:
        given["token_type_ids"] = batch.types_T[None]
    prefixes = attention.prefixes_of(batch)
    if prefixes is not None:
        given["prefixes"] = prefixes
    if virtual is not None:
        given["virtual"] = virtual.layers
        position_T = position_T + virtual.n
    set_keys(model, None if batch.noise_T is None else batch.noise_T[None])
    out = decoder_of(model)(
        **given, position_ids=position_T[None], cu_seqlens=batch.cu_seqlens.tolist(), use_cache=False
    )
    return out.last_hidden_state[0]


def padded(model: nn.Module, batch: Batch, inputs: dict[str, Tensor]) -> Tensor:
    """[T, D]. inputs: as in `packed`. Raises ValueError for segments that continue others, and for a soft prompt."""
    if attention.prefixes_of(batch) is not None or virtual_of(model) is not None:
        raise ValueError("a model that runs padded cannot share prefixes, nor have a soft prompt")
    hidden, order = [], []
    for rows, at_N, lengths in segments_of(batch):
        given = {name: pad(values[at_N], lengths) for name, values in inputs.items()}
        if batch.types_T is not None:
            given["token_type_ids"] = pad(batch.types_T[at_N], lengths)
        given["attention_mask"] = real(lengths, at_N.device)
        set_keys(model, *noise_keys(batch, rows, at_N, lengths))
        hidden.append(unpad(_decode(model, batch, rows, given), lengths))
        order.append(at_N)
    return torch.cat(hidden)[torch.cat(order).argsort()]


def segments_of(batch: Batch) -> Iterator[tuple[list[int], Tensor, list[int]]]:
    """(segments, [N] their tokens' places in the pack, their lengths) of each set of segments of similar length."""
    lengths = batch.cu_seqlens.diff().tolist()
    sides = [lengths] if batch.source is None else [lengths, batch.source.cu_seqlens.diff().tolist()]
    for rows in buckets(list(zip(*sides, strict=True))):
        yield rows, _tokens(batch.cu_seqlens, rows), [lengths[i] for i in rows]


def _decode(model: nn.Module, batch: Batch, rows: list[int], given: dict[str, Tensor]) -> Tensor:
    """[B, L, D] of a padded batch; an encoder-decoder reads the rows' sources first."""
    extra: dict[str, Any] = {}
    if batch.source is not None:
        lengths = batch.source.cu_seqlens.diff()[rows].tolist()
        tokens_BL = pad(batch.source.tokens_U[_tokens(batch.source.cu_seqlens, rows)], lengths)
        mask_BL = real(lengths, tokens_BL.device)
        encoder: Any = causal_lm(model).get_encoder()  # type: ignore[operator]
        read = encoder(input_ids=tokens_BL, attention_mask=mask_BL).last_hidden_state
        extra = {"encoder_hidden_states": read, "encoder_attention_mask": mask_BL}
    return decoder_of(model)(**given, **extra, use_cache=False).last_hidden_state


def noise_keys(batch: Batch, rows: list[int], at_N: Tensor, lengths: list[int]) -> tuple[Tensor | None, Tensor | None]:
    """([B, L], [B, L of the sources]) keys of a padded batch's noise, None where there is none."""
    if batch.noise_T is None:
        return None, None
    key_BL = pad(batch.noise_T[at_N], lengths)
    if batch.source is None:
        return key_BL, None
    places_N = _tokens(batch.source.cu_seqlens, rows)
    return key_BL, pad(source_keys(batch)[places_N], batch.source.cu_seqlens.diff()[rows].tolist())


def _tokens(cu_seqlens: Tensor, rows: list[int]) -> Tensor:
    """[N] the places of the rows' tokens in the pack, row after row."""
    ends = cu_seqlens.tolist()
    return torch.cat([torch.arange(ends[i], ends[i + 1], device=cu_seqlens.device) for i in rows])


LAYOUTS: dict[str, Callable[[nn.Module, Batch, dict[str, Tensor]], Tensor]] = {PACKED: packed, PADDED: padded}
