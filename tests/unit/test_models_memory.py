"""The estimate: right counts for a model whose numbers are known, and the directions that must hold."""

from __future__ import annotations

from types import SimpleNamespace

from tunewright.models.memory import estimate

SMOLLM = SimpleNamespace(
    hidden_size=576, num_hidden_layers=30, vocab_size=49152, intermediate_size=1536, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip
N = 134_515_008
LORA = 4_884_480


def test_flops_of_the_known_model() -> None:
    got = estimate(SMOLLM, N, LORA, 2048, 0.25, "bfloat16", length=150)
    body = N - 49152 * 576
    assert got["flops_forward"] == 2 * body + 2 * 150 * 576 * 30 + 2 * 49152 * 576 // 4 + 2 * LORA
    full = estimate(SMOLLM, N, N, 2048, 0.25, "bfloat16", length=150)
    lora_step, full_step = (x["flops_forward"] + x["flops_backward"] for x in (got, full))
    assert 1.3 < full_step / lora_step < 1.6


def test_bytes_of_what_can_be_counted() -> None:
    got = estimate(SMOLLM, N, LORA, 2048, 0.25, "bfloat16")
    assert got["weights"] == 2 * N
    assert got["optimizer"] == 8 * LORA
    full = estimate(SMOLLM, N, N, 2048, 0.25, "bfloat16")
    assert full["weights"] + full["trainable"] + full["optimizer"] == 16 * N
    assert got["peak"] == sum(got[k] for k in ("weights", "trainable", "optimizer", "activations", "head"))


def test_more_tokens_need_more_and_half_the_bytes_need_half() -> None:
    small, large = (estimate(SMOLLM, N, LORA, t, 0.25, "bfloat16") for t in (512, 4096))
    assert large["activations"] == 8 * small["activations"]
    wide = estimate(SMOLLM, N, LORA, 512, 0.25, "float32")
    assert wide["activations"] == 2 * small["activations"]
