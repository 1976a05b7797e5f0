"""`python -m tunewright.models.shape`: what a model is made of, counted on meta tensors: no weights, any size.

Reads the object of a config.json (with `model_type`) from standard input and prints what shape_of() returns.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from tunewright.ops import quant
from tunewright.ops.runtime import quiet

# transformers' names for the same number
_ALIASES = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim", "d_kv"),
    "ffn": ("intermediate_size", "ffn_dim", "n_inner", "d_ff"),
    "experts": ("num_experts_per_tok",),
}


def shape_of(model: nn.Module) -> dict[str, Any]:
    """Counts of a transformers model, whether it holds weights or not.

    parameters: all. embedding: those of the input embedding and of an own LM head. largest: of one linear layer.
    linears: [[in, out, how many]] of the linear layers without the head. vocab, hidden, layers (both sides of an
    encoder-decoder), q, kv, ffn: values a token; gated: whether the ffn has a gate; experts: of them a token uses.
    """
    config: Any = model.config
    head = model.get_output_embeddings()  # type: ignore[operator]
    embedded = model.get_input_embeddings().weight  # type: ignore[operator,union-attr]
    own_head = 0 if head is None or head.weight is embedded else head.weight.numel()
    found = Counter(_size(m) for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head)
    hidden, heads = _get(config, "hidden"), _get(config, "heads")
    head_dim = _get(config, "head_dim") or hidden // heads
    ffn = _get(config, "ffn") or 4 * hidden
    sides = _get(config, "layers") + (getattr(config, "num_decoder_layers", 0) or 0)
    return {
        "parameters": quant.count(model),
        "embedding": embedded.numel() + own_head,
        "largest": max(i * o for i, o in found),
        "linears": [[i, o, n] for (i, o), n in sorted(found.items())],
        "vocab": config.vocab_size,
        "hidden": hidden,
        "layers": sides,
        "q": heads * head_dim,
        "kv": (_get(config, "kv_heads") or heads) * head_dim,
        "ffn": ffn,
        "gated": sum(n for (_, o), n in found.items() if o == ffn) >= 2 * sides or bool(_get(config, "experts")),
        "experts": _get(config, "experts") or 1,
        "two_sided": bool(config.is_encoder_decoder),
        "context": getattr(config, "max_position_embeddings", None),
    }


def on_meta(config: PreTrainedConfig) -> nn.Module:
    """The language model of a config without memory for its weights."""
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"), quiet():
        return kind.from_config(config)


def quantised_bytes(folder: Path, n: int, size: int, name: str) -> float:
    """Bytes of a model folder's weights when its linear layers are held in `name`, and one of them decoded.

    n: numbers in its files. size: bytes of one that is not quantised.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"), quiet():
        body = AutoModel.from_config(config)  # without the head, which is not quantised
    linear = [m.weight.numel() for m in body.modules() if quant.can_be_quantised(m)]  # type: ignore[union-attr,operator]
    return sum(linear) * quant.CODINGS[name].size + (n - sum(linear) + max(linear, default=0)) * size


def _size(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):  # a quantised one would decode its weight to be asked for its shape
        return module.in_features, module.out_features
    return tuple(module.weight.shape)  # type: ignore[return-value,arg-type]


def _get(config: Any, name: str) -> int:
    return int(next((v for key in _ALIASES[name] if (v := getattr(config, key, None))), 0))


def main() -> None:
    raw = json.load(sys.stdin)
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    shape = shape_of(on_meta(config))
    if config.tie_word_embeddings and raw.get("tie_word_embeddings") is False:
        # T5's class overwrites what its config says, and finds out from the weights that their head is its own
        head = shape["vocab"] * shape["hidden"]
        shape = {**shape, "parameters": shape["parameters"] + head, "embedding": shape["embedding"] + head}
    json.dump(shape, sys.stdout)


if __name__ == "__main__":
    main()
