"""Bringing a model into the store, and opening it: exact, once, safe, and with one clear error for anything else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf.quants import dequantize, quantize
from gguf_kit import write_gguf
from safetensors.torch import load_file, save_file
from test_models_catalogue import install_package
from transformers import AutoTokenizer

import tiny
from tunewright.core import durable
from tunewright.core.errors import UserError
from tunewright.core.home import Home
from tunewright.models.catalogue import CATALOGUE
from tunewright.models.heads import Head
from tunewright.models.loader import load_model, materialise


@pytest.fixture
def copy(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_is_used_where_it_is_and_never_written(tiny_model_dir: Path, home: Home) -> None:
    before = {p: p.stat().st_mtime_ns for p in tiny_model_dir.iterdir()}
    assert materialise(str(tiny_model_dir), home) == tiny_model_dir
    load_model(tiny_model_dir)
    assert {p: p.stat().st_mtime_ns for p in tiny_model_dir.iterdir()} == before


def test_gguf_becomes_the_same_model_and_tokenizer(tiny_model_dir: Path, home: Home, tmp_path: Path, capfd) -> None:
    path = write_gguf(tiny_model_dir, tmp_path / "small.gguf")
    phases: list[str] = []
    folder = materialise(str(path), home, lambda phase, done, total: phases.append(phase))
    assert folder == home.models / "small"
    assert phases == ["checking the file", "dequantising", "saving"]
    assert capfd.readouterr().err == ""
    got, want = load_file(folder / "model.safetensors"), load_file(tiny_model_dir / "model.safetensors")
    assert set(got) == set(want)
    assert all(got[k].dtype == torch.float32 and torch.equal(got[k], want[k]) for k in want)
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tiny_model_dir)
    assert ours.chat_template == theirs.chat_template
    text = "<|im_start|>user\nwhat colour is the sky?<|im_end|>\n"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert (ours.eos_token, ours.bos_token) == ("<|im_end|>", "<|im_start|>")
    record = json.loads((folder / "source.json").read_text())
    assert record["sha256"] == durable.sha256_file(path)
    assert record["tokenizer_rule"] == "smollm" and record["tensor_types"] == ["F32"]
    durable.check_folder(folder)
    assert materialise(str(path), home, lambda *a: pytest.fail("made again")) == folder
    load_model(folder)


def test_smollm_rule_puts_every_digit_on_its_own(tiny_model_dir: Path, home: Home, tmp_path: Path) -> None:
    folder = materialise(str(write_gguf(tiny_model_dir, tmp_path / "d.gguf")), home)
    split = AutoTokenizer.from_pretrained(folder).backend_tokenizer.pre_tokenizer.pre_tokenize_str("in  2024x")
    assert [s for s, _ in split] == ["in", "ĠĠ", "2", "0", "2", "4", "x"]


def test_q4_1_is_dequantised_exactly(tiny_model_dir: Path, home: Home, tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType

    kind = GGMLQuantizationType.Q4_1
    folder = materialise(str(write_gguf(tiny_model_dir, tmp_path / "q.gguf", quantised=True)), home)
    got, want = load_file(folder / "model.safetensors"), load_file(tiny_model_dir / "model.safetensors")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"):
        expected = torch.from_numpy(dequantize(quantize(want[name].numpy(), kind), kind))
        assert torch.equal(got[name], expected)
        assert not torch.equal(got[name], got[name].half().float()), "float16 would lose something"


def test_unknown_text_splitting_rule_is_refused(tiny_model_dir: Path, home: Home, tmp_path: Path) -> None:
    path = write_gguf(tiny_model_dir, tmp_path / "odd.gguf", rule="martian")
    with pytest.raises(UserError, match="the rule 'martian', which is not known here"):
        materialise(str(path), home)
    assert list(home.models.glob("[!.]*")) == []


def test_a_file_that_is_not_gguf_is_refused(home: Home, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"not a model at all" * 10)
    with pytest.raises(UserError, match=r"bad\.gguf is not a readable GGUF file"):
        materialise(str(tmp_path / "bad.gguf"), home)


def test_a_package_file_with_another_hash_is_refused(home: Home, tmp_path: Path, monkeypatch) -> None:
    install_package(monkeypatch, tmp_path / "site")
    with pytest.raises(UserError, match="is not the one that tunewright knows: its sha256 is") as e:
        materialise("fake", home)
    assert e.value.code == "model_file_changed"
    assert not (home.models / "fake").exists()


@pytest.mark.slow
def test_a_package_may_hold_a_model_folder(tiny_model_dir: Path, home: Home, tmp_path: Path, monkeypatch) -> None:
    install_package(monkeypatch, tmp_path / "site")
    folder = tmp_path / "site" / "fake_model" / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "code.py").write_text("raise RuntimeError('copied')")
    weights = folder / "model.safetensors"
    row = replace(CATALOGUE["fake"], file="fake_model/model/model.safetensors", sha256=durable.sha256_file(weights))
    monkeypatch.setitem(CATALOGUE, "fake", row)
    made = materialise("fake", home)
    assert made == home.models / "fake"
    assert {p.name for p in made.iterdir()} == {p.name for p in tiny_model_dir.iterdir()} | {
        "source.json",
        "MANIFEST.json",
    }
    assert (made / "model.safetensors").read_bytes() == weights.read_bytes()
    load_model(made)


def test_a_new_head_comes_from_its_seed_and_an_old_one_from_the_file(tiny_model_dir: Path, tmp_path: Path) -> None:
    a, b, c = (load_model(tiny_model_dir, head=Head("classify", ("x", "y"), seed)) for seed in (1, 1, 2))
    assert torch.equal(a.score.weight, b.score.weight) and not torch.equal(a.score.weight, c.score.weight)
    a.save_pretrained(tmp_path / "m")
    shutil.copy(tiny_model_dir / "tokenizer.json", tmp_path / "m")
    assert torch.equal(load_model(tmp_path / "m", head=Head("classify", ("x", "y"), 3)).score.weight, a.score.weight)
    with pytest.raises(UserError, match=r"do not fit .* score.weight"):
        load_model(tmp_path / "m", head=Head("classify", ("x", "y", "z")))


def test_the_architectures_dropout_is_off(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Else a step would depend on how it is cut: in training mode, twice the same."""
    model = load_model(tiny.build_family(tmp_path / "gpt2", "gpt2", tiny_model_dir)).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.slow
def test_two_processes_make_a_model_once(tiny_model_dir: Path, home: Home, tmp_path: Path) -> None:
    path = write_gguf(tiny_model_dir, tmp_path / "twice.gguf")
    code = (
        "import sys; from pathlib import Path; from tunewright.core.home import Home;"
        "from tunewright.models.loader import materialise;"
        "print(materialise(sys.argv[1], Home(Path(sys.argv[2])), lambda p, d, t: print(p)))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(path), str(home.root)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outs = [p.communicate(timeout=120)[0].splitlines() for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert [o[-1] for o in outs] == [str(home.models / "twice")] * 2
    assert sum("dequantising" in o for o in outs) == 1
    durable.check_folder(home.models / "twice")


def test_a_crash_while_making_a_model_leaves_none(
    home: Home, tiny_model_dir: Path, tmp_path: Path, monkeypatch
) -> None:
    path = write_gguf(tiny_model_dir, tmp_path / "c.gguf")

    def cut(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tunewright.models.loader._write_record", cut)
    with pytest.raises(KeyboardInterrupt):
        materialise(str(path), home)
    assert list(home.models.glob("[!.]*")) == []


def test_code_from_the_model_is_never_run(copy: Path) -> None:
    (copy / "evil.py").write_text("raise SystemExit('ran')")
    edit_config(copy, auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(UserError, match="never runs code from model files"):
        load_model(copy)


def test_pickle_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=r"only pytorch_model\.bin, a format that can run code"):
        load_model(copy)


def test_quantised_weights_are_refused(copy: Path) -> None:
    edit_config(copy, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(UserError, match=r"quantised \(bitsandbytes\)"):
        load_model(copy)


def test_a_missing_tensor_is_refused_not_drawn_at_random(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"first model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(copy)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"\x00" * 40, "cannot be loaded"),
        ("config.json", b"{not json", "its config.json cannot be read"),
        ("config.json", b"[]", "config.json is not an object"),
        ("config.json", b'{"model_type": "no-such-model"}', "cannot be loaded"),
        ("config.json", b'{"model_type": "t5"}', "tensors are missing"),
        ("config.json", b'{"model_type": "clip"}', "cannot be loaded"),
    ],
)
def test_damaged_and_unsuitable_folders(copy: Path, name: str, content: bytes, message: str) -> None:
    (copy / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as e:
        load_model(copy)
    assert "\n" not in e.value.message and str(copy.parent) not in e.value.message


def test_a_shape_that_does_not_fit_is_refused(copy: Path) -> None:
    edit_config(copy, intermediate_size=96)
    with pytest.raises(UserError):
        load_model(copy)


def test_a_folder_without_tokenizer_is_refused(copy: Path, home: Home) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        materialise(str(copy), home)


def test_loading_is_silent_and_ready_to_train(tiny_model_dir: Path, capfd) -> None:
    model = load_model(tiny_model_dir, torch.bfloat16)
    assert capfd.readouterr() == ("", "")
    assert not model.training and not model.config.use_cache
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
