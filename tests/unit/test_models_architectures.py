"""Every architecture either gives exactly what transformers gives, packed, or is refused before anything is trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tunewright.core.errors import UserError
from tunewright.core.example import Example, Group
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy, head_of
from tunewright.ops.packing import collate

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WORK: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 3},
    "phi3": {},
    "olmo2": {},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
    "gemma3_text": {"sliding_window": 3, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma": {"head_dim": 8},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gemma2": ({"head_dim": 8, "query_pre_attn_scalar": 8}, "capped attention scores"),
    "gpt_oss": ({"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, "attention sinks"),
    "bloom": ({"n_head": 4, "n_layer": 2}, "cannot be"),
    "mamba": ({"state_size": 4}, "cannot be"),
    "bamba": ({"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "attn_layer_indices": [1]}, "cannot be"),
}


def save(kind: str, changes: dict[str, Any], folder: Path, tokenizer: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**SMALL, **changes})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    shutil.copy(tokenizer / "tokenizer.json", folder)
    return folder


@pytest.mark.parametrize("kind", WORK)
def test_packed_logits_are_those_of_transformers(kind: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    folder = save(kind, WORK[kind], tmp_path / kind, tiny_model_dir)
    model = load_model(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    rows = [[5, 9, 33, 7, 61, 8, 20, 4, 90], [3], [44, 45, 46, 47, 9]]
    batch = collate([Group((Example(tuple(r), (1.0,) * len(r)),)) for r in rows])
    with torch.no_grad():
        got = head_of(model).logits(Policy(model).hidden(batch)).split([len(r) for r in rows])
        for ours, row in zip(got, rows, strict=True):
            torch.testing.assert_close(ours, plain(torch.tensor([row])).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_packed_is_refused(kind: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    changes, why = REFUSED[kind]
    folder = save(kind, changes, tmp_path / kind, tiny_model_dir)
    with pytest.raises(UserError, match=why) as e:
        load_model(folder)
    assert e.value.code == "unsupported_model"
