"""Writes a Llama folder as a GGUF file, by the format's own rules (independent of the code under test)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from safetensors.numpy import load_file

BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in TOP:
        return f"{TOP[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{BLOCK[rest]}.weight"


def interleave(w: np.ndarray, heads: int) -> np.ndarray:
    """The rotary halves of each head, interleaved as GGUF keeps them for Llama."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(folder: Path, path: Path, rule: str = "smollm", quantised: bool = False) -> Path:
    """rule: tokenizer.ggml.pre. quantised: matrices as Q4_1, else float32."""
    config = json.loads((folder / "config.json").read_text())
    raw = json.loads((folder / "tokenizer.json").read_text())
    out = GGUFWriter(path, "llama")
    out.add_block_count(config["num_hidden_layers"])
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(config["num_attention_heads"])
    out.add_head_count_kv(config["num_key_value_heads"])
    out.add_rope_dimension_count(config["head_dim"])
    out.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_vocab_size(config["vocab_size"])
    special = {t["content"] for t in raw["added_tokens"]}
    tokens = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].__getitem__)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(rule)
    out.add_token_list(tokens)
    out.add_token_types([TokenType.CONTROL if t in special else TokenType.NORMAL for t in tokens])
    out.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in raw["model"]["merges"]])
    out.add_bos_token_id(config["bos_token_id"])
    out.add_eos_token_id(config["eos_token_id"])
    out.add_pad_token_id(config["pad_token_id"])
    out.add_unk_token_id(0)
    out.add_add_bos_token(False)
    out.add_chat_template((folder / "chat_template.jinja").read_text())
    for name, w in load_file(folder / "model.safetensors").items():
        if "q_proj" in name:
            w = interleave(w, config["num_attention_heads"])
        if "k_proj" in name:
            w = interleave(w, config["num_key_value_heads"])
        if quantised and w.ndim == 2:
            kind = GGMLQuantizationType.Q4_1
            out.add_tensor(gguf_name(name), quantize(w, kind), raw_dtype=kind)
        else:
            out.add_tensor(gguf_name(name), w)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
