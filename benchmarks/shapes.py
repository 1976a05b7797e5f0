"""Random weights in the shape of a known model, for machines without a network: only speed and memory mean anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tunewright.core.durable import commit_folder
from tunewright.core.home import Home

# Llama 3.2 1B and Llama 3.1 8B: hidden, intermediate, layers, heads, key/value heads, head width, tied embeddings
SHAPES = {
    "1b": (2048, 8192, 16, 32, 8, 64, True),
    "8b": (4096, 14336, 32, 32, 8, 128, False),
}
VOCABULARY = 128_256
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def make_shape(size: str, tokenizer_of: str, home: Home) -> str:
    """The catalogue name of the model of that size, made in `home` if it is not there; with another model's tokenizer.

    size: `1b` or `8b`. The 8b one takes 16 GB of disk.
    """
    from tunewright.models.loader import materialise

    name = f"random-llama-{size}"
    if not (home.models / name / "config.json").exists():
        source = materialise(tokenizer_of, home)
        commit_folder(home.models / name, lambda folder: fill(folder, size, source))
    return name


def fill(folder: Path, size: str, tokenizer_of: Path) -> None:
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, kv, width, tied = SHAPES[size]
    known = json.loads((tokenizer_of / "config.json").read_text())
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=width,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=tied,
        dtype="bfloat16",
        **{name: known.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    torch.manual_seed(0)
    old = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(old)
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer_of / name).exists():
            shutil.copyfile(tokenizer_of / name, folder / name)
    (folder / "source.json").write_text(json.dumps({"name": folder.name, "source": "random weights for benchmarks"}))
