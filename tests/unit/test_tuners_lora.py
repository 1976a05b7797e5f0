"""What is LoRA's own: targets, continuing from an adapter, and the files it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from tunewright.core.errors import CheckpointError, SpecError
from tunewright.models.loader import load_model
from tunewright.ops.noise import KeyedDropout
from tunewright.tuners.adapter_files import saved_shape
from tunewright.tuners.lora import LoRA
from tunewright.tuners.peft_adapter import merge_adapter

LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def attached(folder: Path, **options: object) -> tuple[LoRA, nn.Module]:
    tuner = LoRA(LoRA.Options(**options))
    return tuner, tuner.attach(load_model(folder), 0)


def test_all_linear_is_every_linear_layer_but_the_head(tiny_model_dir: Path) -> None:
    tuner, _ = attached(tiny_model_dir)
    assert len(tuner.trainable()) == 2 * 7 * 2
    assert not any("lm_head" in k or "embed" in k for k in tuner.trainable())


def test_chosen_targets(tiny_model_dir: Path, tmp_path: Path) -> None:
    tuner, _ = attached(tiny_model_dir, target_modules=["v_proj", "layers.0.mlp.up_proj"], r=4, alpha=6)
    shapes = {k: tuple(p.shape) for k, p in tuner.trainable().items()}
    assert sorted({k.split(".lora_")[0].rpartition("layers.")[2] for k in shapes}) == [
        "0.mlp.up_proj",
        "0.self_attn.v_proj",
        "1.self_attn.v_proj",
    ]
    assert {s[0] for k, s in shapes.items() if "lora_A" in k} == {4}
    tuner.save(tmp_path, "base")
    targets = ["layers.0.mlp.up_proj", "v_proj"]
    assert saved_shape(tmp_path) == {"method": "lora", "r": 4, "alpha": 6, "target_modules": targets}


@pytest.mark.parametrize("target", ["q_porj", "lm_head", "embed_tokens", "proj", ""])
def test_a_target_that_the_model_has_not_is_named(tiny_model_dir: Path, target: str) -> None:
    with pytest.raises(SpecError, match=f"no linear layer '{target}'.*It has: {', '.join(LINEAR)}"):
        attached(tiny_model_dir, target_modules=["v_proj", target])


def test_the_nearest_target_is_offered(tiny_model_dir: Path) -> None:
    with pytest.raises(SpecError, match=r"Did you mean 'q_proj'\?"):
        attached(tiny_model_dir, target_modules=["q_porj"])


@pytest.mark.parametrize("options", [{"r": 0}, {"r": 1.5}, {"alpha": 0}, {"target_modules": "some"}, {"dropout": 1.0}])
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LoRA.Options(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 8}, "r is 16 there and 8 in this job"),
        ({"alpha": 16}, "alpha is 32 there and 16 in this job"),
        ({"target_modules": ["q_proj"]}, r"target_modules is .*up_proj.* there and \['q_proj'\] in this job"),
    ],
)
def test_continuing_with_other_options_names_both_values(
    tiny_model_dir: Path, tmp_path: Path, options: dict[str, object], said: str
) -> None:
    attached(tiny_model_dir)[0].save(tmp_path, "base")
    with pytest.raises(SpecError, match=said):
        attached(tiny_model_dir, **options)[0].load(tmp_path)


def test_the_files_are_peft_s_with_the_base_s_name(tiny_model_dir: Path, tmp_path: Path) -> None:
    tuner, _ = attached(tiny_model_dir)
    tuner.save(tmp_path, "smollm2-135m-instruct")
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "smollm2-135m-instruct"
    assert (config["peft_type"], config["task_type"], config["inference_mode"]) == ("LORA", "CAUSAL_LM", True)
    assert config["target_modules"] == LINEAR
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_an_adapter_without_safetensors_is_never_unpickled(tiny_model_dir: Path, tmp_path: Path) -> None:
    attached(tiny_model_dir)[0].save(tmp_path, "base")
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"has no file adapter_model\.safetensors"):
        merge_adapter(load_model(tiny_model_dir), tmp_path)
    with pytest.raises(CheckpointError):
        attached(tiny_model_dir)[0].load(tmp_path)
    with pytest.raises(CheckpointError, match="is not an adapter"):
        saved_shape(tmp_path / "nowhere")


def test_dropout_is_ours_in_every_layer_and_peft_reads_its_share(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The weights start the same as without it, and the file says what peft calls lora_dropout."""
    plain, _ = attached(tiny_model_dir)
    tuner, model = attached(tiny_model_dir, dropout=0.25)
    places = {m.place for m in model.modules() if isinstance(m, KeyedDropout)}
    assert len(places) == len(tuner.trainable()) / 2  # each layer draws its own
    assert not any(isinstance(m, nn.Dropout) and m.p for m in model.modules())
    assert all(torch.equal(p, plain.trainable()[k]) for k, p in tuner.trainable().items())
    tuner.save(tmp_path, str(tiny_model_dir))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.25
    opened = PeftModel.from_pretrained(load_model(tiny_model_dir), str(tmp_path))  # type: ignore[arg-type]
    assert {m.p for m in opened.modules() if isinstance(m, nn.Dropout)} == {0.25}
    plain.load(tmp_path)  # another dropout is no other adapter
