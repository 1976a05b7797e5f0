"""The estimate: counts of models whose sizes are published, and what is known of the memory they take."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from tunewright.models import memory
from tunewright.models.known import ALIASES, KNOWN
from tunewright.models.memory import Setting
from tunewright.models.shape import on_meta, shape_of

# published in the models' papers and cards; T5's and mT5's own LM head is counted in models.shape.main
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "qwen3-0.6b": 596_049_920,
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "bloomz-7b1": 7_069_016_064,
}


def shape(name: str) -> dict[str, Any]:
    config = dict(KNOWN[name])
    return shape_of(on_meta(AutoConfig.for_model(config.pop("model_type"), **config)))


@pytest.fixture(scope="module")
def llama() -> dict[str, Any]:
    return shape("llama2-7b")


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones(name: str) -> None:
    assert shape(name)["parameters"] == PARAMETERS[name]


def test_every_alias_leads_somewhere() -> None:
    assert set(ALIASES.values()) <= set(KNOWN)
    assert all(name == name.lower() for name in (*KNOWN, *ALIASES))


def test_lora_of_all_linear_layers_is_counted_exactly(llama: dict[str, Any]) -> None:
    """39,976,960 for rank 16: the figure that peft prints for Llama-2-7B."""
    assert memory.trainable(llama, "lora", 16) == 39_976_960
    assert memory.trainable(llama, "full", 16) == llama["parameters"]


def test_full_training_holds_sixteen_bytes_a_parameter(llama: dict[str, Any]) -> None:
    p = memory.parts(llama, Setting("full", "float32"))
    assert p["weights"] + p["gradients"] + p["optimizer"] == 16 * llama["parameters"]
    assert memory.parts(llama, Setting("lora"))["weights"] == 2 * llama["parameters"]


@pytest.mark.parametrize(
    ("name", "setting", "low", "high"),
    [
        # QLoRA paper (arXiv 2305.14314): 65B in 48 GB, from more than 780 GB
        ("llama-65b", Setting("qlora", checkpointing="full", tokens=512), 33e9, 48e9),
        ("llama-65b", Setting("full", "float32", "full", tokens=512), 780e9, 1300e9),
        # Unsloth's documentation: 8B takes 6 GB with 4 bits and 22 GB with 16, 70B 41 GB with 4
        ("llama3-8b", Setting("qlora", checkpointing="full", tokens=512), 5e9, 8.5e9),
        ("llama3-8b", Setting("lora", tokens=512), 17e9, 23e9),
        ("llama2-70b", Setting("qlora", checkpointing="full", tokens=512), 36e9, 46e9),
    ],
)
def test_known_figures_of_the_field_are_met(name: str, setting: Setting, low: float, high: float) -> None:
    assert low <= memory.needs(shape(name), setting, gpu=True)["device"] <= high


def test_the_directions_that_must_hold(llama: dict[str, Any]) -> None:
    base = Setting(tokens=2048)
    need = {c: memory.needs(llama, replace(base, checkpointing=c), True)["device"] for c in memory.CHECKPOINTING}
    assert need["full"] < need["selective"] < need["none"]
    assert memory.activation_bytes(llama, replace(base, dtype="float32")) > 1.5 * memory.activation_bytes(llama, base)
    wide = memory.parts(llama, replace(base, tokens=4096))
    assert wide["activations"] == 2 * memory.parts(llama, base)["activations"]
    offload = memory.needs(llama, replace(base, offload=True), True)
    assert offload["device"] < need["none"] and offload["cpu"] > 2 * llama["parameters"]


def test_the_longest_row_is_the_one_that_just_fits(llama: dict[str, Any]) -> None:
    setting = Setting("lora", checkpointing="full")
    n = memory.longest(llama, setting, 24e9, True)
    assert n > 2048
    assert memory.needs(llama, replace(setting, tokens=n), True)["device"] <= 24e9
    assert memory.needs(llama, replace(setting, tokens=n + 2), True)["device"] > 24e9
    assert memory.longest(llama, setting, 10e9, True) == 0


def test_the_table_goes_from_fast_to_small_and_says_what_fits(llama: dict[str, Any]) -> None:
    rows = memory.table(llama, Setting("full"), 24e9, True)
    fitting = [r["title"] for r in rows if r["fits"] and r["here"]]
    assert fitting[0] == "LoRA r=16, bfloat16, checkpointing selective"
    assert [r["tuner"] for r in memory.table(llama, Setting("lora"), 24e9, False)] == ["lora"] * 3 + ["qlora"] * 3


def test_stored_parameters_are_read_from_the_headers(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {}, "a": {"shape": [3, 4]}, "b": {"shape": []}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert memory.stored_parameters(tmp_path) == 13


def test_flops_of_the_known_model() -> None:
    small = shape("smollm2-135m")
    work = memory.flops(small, "full", 16)
    body = 134_515_008 - 49152 * 576 - 61 * 576  # without embedding and norms
    assert work["token"] == 6 * body and work["supervised"] == 6 * 49152 * 576
    assert memory.flops(small, "lora", 16)["token"] == 4 * body + 6 * memory.trainable(small, "lora", 16)
