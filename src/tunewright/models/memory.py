"""What a training step costs, by counting: bytes at the peak and floating-point operations a token. No measurement."""

from __future__ import annotations

from typing import Any

_BYTES = {"float32": 4, "bfloat16": 2}
_HEAD_CHUNK = 256


def estimate(
    config: Any,
    n_params: int,
    n_trainable: int,
    micro_batch_tokens: int,
    supervised_share: float,
    dtype: str,
    *,
    length: int = 512,
    optimizer_copies: int = 2,
) -> dict[str, int]:
    """Bytes and FLOPs of a step with a decoder of Llama's shape.

    config: anything with transformers' names (hidden_size, num_hidden_layers …). n_params, n_trainable: counts.
    micro_batch_tokens: tokens of one forward. supervised_share: 0 to 1, tokens that reach the LM head.
    dtype: `float32` or `bfloat16`. length: typical row length, for the attention's share.
    optimizer_copies: float32 tensors the optimizer keeps per trained parameter.

    Returns {"weights", "trainable", "optimizer", "activations", "head", "peak"} in bytes and
    {"flops_forward", "flops_backward"} per token.
    """
    d, layers, vocab = config.hidden_size, config.num_hidden_layers, config.vocab_size
    ffn = getattr(config, "intermediate_size", None) or 4 * d
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or d // heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    size = _BYTES[dtype]
    full = n_trainable > n_params // 2

    # kept for the backward, values a token and layer: two norms with their inputs, q k v and their rotated copies,
    # attention output, gate, up, their product and its activation
    kept = 6 * d + 3 * head_dim * (heads + 2 * kv) + 4 * ffn
    lora_inputs = 0 if full else n_trainable // (layers * 2 * max(d, 1))  # about the ranks' width
    activations = micro_batch_tokens * layers * (kept + lora_inputs) * size
    rows = min(_HEAD_CHUNK, max(1, round(micro_batch_tokens * supervised_share)))
    head = rows * vocab * (4 + 4 + size)
    weights = n_params * (4 if full else size)
    trainable = n_trainable * 4 * (1 if full else 2)  # gradients, and beside a frozen base the masters too
    optimizer = n_trainable * 4 * optimizer_copies

    body = n_params - vocab * d * (1 if getattr(config, "tie_word_embeddings", False) else 2)
    attention = 2 * length * heads * head_dim * layers
    forward = 2 * body + attention + 2 * vocab * d * supervised_share
    own = 0 if full else 2 * n_trainable
    backward = (2 if full else 1) * 2 * body + 2.5 * attention + 2 * vocab * d * supervised_share * (3 if full else 1)
    return {
        "weights": weights,
        "trainable": trainable,
        "optimizer": optimizer,
        "activations": activations,
        "head": head,
        "peak": weights + trainable + optimizer + activations + head,
        "flops_forward": round(forward + own),
        "flops_backward": round(backward + 2 * own),
    }
