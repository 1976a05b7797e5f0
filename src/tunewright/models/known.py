"""Configurations of models that people ask about, so that an estimate needs neither weights nor a network.

Only what decides the size; the values are those of each model's published config.json.
"""

from __future__ import annotations

from typing import Any


def _llama(hidden: int, ffn: int, layers: int, heads: int, kv: int | None = None, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv or heads,
        "vocab_size": 32000,
        **more,
    }


def _qwen3(hidden: int, ffn: int, layers: int) -> dict[str, Any]:
    shape = _llama(hidden, ffn, layers, 16, 8, vocab_size=151936, tie_word_embeddings=True)
    return {**shape, "model_type": "qwen3", "head_dim": 128}


def _t5(kind: str, hidden: int, ffn: int, heads: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": kind,
        "d_model": hidden,
        "d_ff": ffn,
        "d_kv": 64,
        "num_layers": 24,
        "num_decoder_layers": 24,
        "num_heads": heads,
        "vocab_size": vocab,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }


KNOWN: dict[str, dict[str, Any]] = {
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, vocab_size=49152, tie_word_embeddings=True),
    "smollm2-360m": _llama(960, 2560, 32, 15, 5, vocab_size=49152, tie_word_embeddings=True),
    "qwen3-0.6b": _qwen3(1024, 3072, 28),
    "qwen3-1.7b": _qwen3(2048, 6144, 28),
    "t0-3b": _t5("t5", 2048, 5120, 32, 32128),
    "mt0-xxl": _t5("mt5", 4096, 10240, 64, 250112),
    "bloomz-7b1": {"model_type": "bloom", "hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250880},
    "llama2-7b": _llama(4096, 11008, 32, 32),
    "llama2-13b": _llama(5120, 13824, 40, 40),
    "llama-65b": _llama(8192, 22016, 80, 64),
    "llama2-70b": _llama(8192, 28672, 80, 64, 8),
    "llama3-8b": _llama(4096, 14336, 32, 32, 8, vocab_size=128256, max_position_embeddings=8192),
}
ALIASES = {
    "t0_3b": "t0-3b",
    "bigscience/t0_3b": "t0-3b",
    "bigscience/mt0-xxl": "mt0-xxl",
    "bigscience/bloomz-7b1": "bloomz-7b1",
    "meta-llama/llama-2-7b-hf": "llama2-7b",
    "meta-llama/llama-2-13b-hf": "llama2-13b",
    "meta-llama/llama-2-70b-hf": "llama2-70b",
    "smollm2-135m-instruct": "smollm2-135m",
    "smollm2-135m-instruct-hub": "smollm2-135m",
    "smollm2-360m-instruct": "smollm2-360m",
}
