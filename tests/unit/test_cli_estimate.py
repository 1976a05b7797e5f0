"""`tunewright estimate`: the table, the sentence, JSON, and errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunewright.cli import main
from tunewright.cli.commands import estimate
from tunewright.core.errors import SpecError
from tunewright.core.home import Home

# what models.shape prints for Llama-2-7B
SHAPE = {
    "parameters": 6_738_415_616, "embedding": 262_144_000, "largest": 45_088_768,
    "linears": [[4096, 4096, 128], [4096, 11008, 64], [11008, 4096, 32]], "vocab": 32000, "hidden": 4096, "layers": 32,
    "q": 4096, "kv": 4096, "ffn": 11008, "gated": True, "experts": 1, "two_sided": False, "context": 4096,
}  # fmt: skip


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting takes a process with torch: one test does it."""
    monkeypatch.setattr(estimate, "read_shape", lambda config: SHAPE)


def run(home: Home, *args: str) -> int:
    return main.run(["estimate", "--model", "llama2-7b", "--home", str(home.root), *args])


def test_the_table_and_what_follows(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(home, "--length", "512", "--device", "24GB") == 0
    out = capsys.readouterr().out
    assert out.startswith("llama2-7b: 6,738,415,616 parameters")
    rows = {line.split("\t")[0]: line.split("\t")[-1] for line in out.splitlines() if "\t" in line}
    assert rows["full, bfloat16"] == "no" and rows["LoRA r=16, bfloat16"] == "yes"
    assert rows["QLoRA r=16, bfloat16"] == "yes"
    assert "Fits: LoRA r=16, bfloat16; rows of up to" in out


def test_json_has_bytes(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(home, "--tuner", "lora", "--device", "cpu 32GB", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], found["device_bytes"]) == ("cpu", 32_000_000_000)
    assert {r["tuner"] for r in found["rows"]} == {"lora", "qlora"}
    row = found["rows"][0]
    assert row["bytes"]["weights"] == 2 * SHAPE["parameters"] and row["bytes"]["device"] > row["bytes"]["weights"]


def test_pairs_are_two_rows_and_full_training_holds_a_reference(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = {"dpo": (2, True), "orpo": (2, False), "sft": (1, False)}
    rows = {name: {"card": {"group_size": n, "needs_reference": r}} for name, (n, r) in cards.items()}
    monkeypatch.setattr("tunewright.jobs.describe.load_describe", lambda home: {"objective": rows})
    found = {}
    for name in cards:
        assert run(home, "--device", "cpu 500GB", "--length", "512", "--objective", name, "--json") == 0
        found[name] = json.loads(capsys.readouterr().out)["rows"]
    plain, pairs, compared = (found[name][0]["bytes"] for name in ("sft", "orpo", "dpo"))
    assert pairs["activations"] == compared["activations"] == 2 * plain["activations"]
    assert compared["weights"] == 2 * pairs["weights"] == 2 * plain["weights"]
    lora = {name: next(r["bytes"] for r in found[name] if r["tuner"] == "lora") for name in cards}
    assert lora["dpo"] == lora["orpo"] and lora["dpo"]["weights"] == lora["sft"]["weights"]
    assert run(home, "--objective", "dop") != 0
    assert "Did you mean 'dpo'" in capsys.readouterr().err


def test_nothing_fits_is_said_with_the_smallest(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(home, "--device", "1GB") == 0
    assert "Nothing fits: the smallest setting (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--device", "much"], "'much' is not an amount of memory; examples: 4GB"),
        (["--tuner", "lorra"], "use one of: full, lora, qlora. Did you mean 'lora'?"),
        (["--dtype", "int3"], "use one of: float32, bfloat16, float16."),
    ],
)
def test_wrong_words_are_one_clear_line(
    home: Home, capsys: pytest.CaptureFixture[str], args: list[str], text: str
) -> None:
    assert run(home, *args) == SpecError.exit_code
    assert text in capsys.readouterr().err


def test_a_model_is_a_name_a_folder_or_a_file(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "llama", "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in (tmp_path, tmp_path / "config.json"):
        assert estimate.find_config(str(name), home) == config
    assert estimate.find_config("meta-llama/Llama-2-7b-hf", home)["num_hidden_layers"] == 32
    assert main.run(["estimate", "--model", "lama2-7b", "--home", str(home.root)]) == 65
    assert "Did you mean 'llama2-7b'?" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["24GB", "gpu 24GB", "GPU:24 GB"])
def test_a_device_is_a_gpu_unless_it_says_cpu(text: str) -> None:
    assert estimate.read_device(text) == (True, 24_000_000_000)
    assert estimate.read_device("cpu 1.5GiB") == (False, 1_610_612_736)


@pytest.mark.slow
def test_counting_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    from tunewright.models.known import KNOWN

    shape: dict[str, Any] = estimate.read_shape(KNOWN["llama2-7b"])
    assert shape == {**SHAPE, "context": shape["context"]}
    assert estimate.read_shape(KNOWN["t0-3b"])["parameters"] == 2_849_757_184
    with pytest.raises(Exception, match="cannot be counted"):
        estimate.read_shape({"model_type": "unheard-of"})
