"""Every architecture either gives exactly what transformers gives or is refused before anything is trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from tunewright.core.errors import UserError
from tunewright.core.example import Example, Group
from tunewright.models import probe
from tunewright.models.layouts import use_attention
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy, head_of
from tunewright.ops import attention
from tunewright.ops.packing import collate

PACKED: dict[str, dict[str, Any]] = {
    "phi3": {},
    "olmo2": {},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
    "gemma": {"head_dim": 8},
    "gpt_neox": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}
PADDED: dict[str, dict[str, Any]] = {
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},  # attention sinks
    "falcon": {"alibi": True},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 3},
    "mamba": {"state_size": 4},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bert": ({}, "head: classify"),
    "llama4_text": ({"attention_chunk_size": 4, "num_local_experts": 2, "head_dim": 8}, "numbers are not those"),
}


def save(kind: str, changes: dict[str, Any], folder: Path, tokenizer: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**tiny.SMALL, **changes})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    shutil.copy(tokenizer / "tokenizer.json", folder)
    return folder


@pytest.mark.parametrize("kind", [*PACKED, *PADDED])
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    folder = save(kind, {**PACKED, **PADDED}[kind], tmp_path / kind, tiny_model_dir)
    model = load_model(folder)
    assert Policy(model).layout == ("packed" if kind in PACKED else "padded")
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    rows = [[5, 9, 33, 7, 61, 8, 20, 4, 90], [3], [44, 45, 46, 47, 9]]
    batch = collate([Group((Example(tuple(r), (1.0,) * len(r)),)) for r in rows])
    with torch.no_grad():
        got = head_of(model).logits(Policy(model).hidden(batch)).split([len(r) for r in rows])
        for ours, row in zip(got, rows, strict=True):
            torch.testing.assert_close(ours, plain(torch.tensor([row])).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_run_right_is_refused(kind: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    changes, why = REFUSED[kind]
    folder = save(kind, changes, tmp_path / kind, tiny_model_dir)
    with pytest.raises(UserError, match=why) as e:
        load_model(folder)
    assert e.value.code == "unsupported_model"


def test_a_wrong_mask_is_noticed(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that ignores the segments' ends (packed) or the causal mask (padded) does not pass."""
    whole = attention.segment_attention
    monkeypatch.setattr(
        attention, "segment_attention", lambda q, k, v, cu, **how: whole(q, k, v, [0, q.shape[2]], **how)
    )
    model = load_model(tiny_model_dir)
    assert Policy(model).layout == "padded"  # found wrong when packed, and run the other way
    monkeypatch.setattr(
        attention, "segment_attention", lambda q, k, v, cu, **how: whole(q, k, v, cu, **{**how, "causal": False})
    )
    assert probe._wrong(model, use(model, attention.NAME), False) != ""


def use(model: Any, name: str) -> str:
    use_attention(model, name)
    return name
