"""The scripts of recipes/ do what they say, as a user runs them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny

RECIPES = Path(__file__).parents[2] / "recipes"


def run(name: str, folder: Path, *args: str | Path) -> str:
    env = {**os.environ, "TUNEWRIGHT_HOME": str(folder / "home"), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(RECIPES / name), *map(str, args)]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_our_objective_in_a_lightning_module(
    tiny_model_dir: Path, tmp_path: Path, sft_file: Callable[..., Path]
) -> None:
    pytest.importorskip("lightning")
    data = sft_file(tmp_path, 24)
    said = run("lightning_module.py", tmp_path, tiny_model_dir, data, "--epochs", "4", "--out", tmp_path / "adapter")
    losses = [float(x) for x in re.findall(r"^step \d+: loss ([\d.]+)$", said, re.MULTILINE)]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.2
    assert mean_loss(tiny_model_dir, tmp_path / "adapter") < mean_loss(tiny_model_dir) - 0.1


@pytest.mark.slow
def test_sft_by_hand(tiny_model_dir: Path, tmp_path: Path, sft_file: Callable[..., Path]) -> None:
    """transformers and peft find the rows likelier with the adapter that it leaves."""
    data, out = sft_file(tmp_path, 24), tmp_path / "adapter"
    said = run("sft.py", tmp_path, tiny_model_dir, data, "--epochs", "4", "--rate", "3e-3", "--out", out)
    losses = [float(x) for x in re.findall(r"^step \d+: loss ([\d.]+), accuracy [\d.]+$", said, re.MULTILINE)]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5
    assert mean_loss(tiny_model_dir, out) < mean_loss(tiny_model_dir) - 0.2


@pytest.mark.slow
def test_distillation_by_hand(tiny_model_dir: Path, tmp_path: Path, sft_file: Callable[..., Path]) -> None:
    """The student's distributions come nearer to the teacher's."""
    teacher = tiny.build_tiny_model(tmp_path / "wise", seed=1, hidden_size=96, num_hidden_layers=1)
    data, out = sft_file(tmp_path, 24), tmp_path / "adapter"
    options = ("--teacher", teacher, "--epochs", "4", "--rate", "1e-2", "--out", out)
    said = run("distill.py", tmp_path, tiny_model_dir, data, *options)
    steps = re.findall(r"^step \d+: loss ([\d.]+), accuracy [\d.]+, divergence ([\d.]+)", said, re.MULTILINE)
    assert len(steps) == 12 and all(loss == divergence for loss, divergence in steps)
    assert divergence_from(teacher, tiny_model_dir, out) < 0.9 * divergence_from(teacher, tiny_model_dir)


@pytest.mark.slow
def test_dpo_by_hand(tiny_model_dir: Path, tmp_path: Path) -> None:
    """It begins at ln 2 and margin 0, and the adapter that it leaves prefers the preferred answers more."""
    data = tiny.write_rows(tmp_path / "pairs.jsonl", tiny.pair_rows(16))
    out = tmp_path / "adapter"
    said = run("dpo.py", tmp_path, tiny_model_dir, data, "--epochs", "3", "--rate", "1e-3", "--out", out)
    steps = re.findall(r"^step \d+: loss ([\d.]+), margin (-?[\d.]+)$", said, re.MULTILINE)
    assert len(steps) == 6 and steps[0] == ("0.6931", "0.0000")
    assert float(steps[-1][0]) < 0.6 and float(steps[-1][1]) > 0.2
    assert (out / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_rlaif_by_hand(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The rule labels the sampled pairs, and the adapter that it leaves prefers the shorter answers."""
    prompts = [{"prompt": f"Question {i}: what colour is {tiny.THINGS[i % 8]}?"} for i in range(24)]
    data, out = tiny.write_rows(tmp_path / "prompts.jsonl", prompts), tmp_path / "adapter"
    options = ("--tokens", "12", "--epochs", "3", "--rate", "1e-3", "--out", out)
    said = run("rlaif.py", tmp_path, tiny_model_dir, data, *options)
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert f"{len(pairs)} of 24 pairs judged" in said and len(pairs) >= 8
    for row in pairs:
        assert len(row["preferred_output"][0]["content"]) < len(row["non_preferred_output"][0]["content"])
    steps = re.findall(r"^epoch \d: loss ([\d.]+), margin (-?[\d.]+)$", said, re.MULTILINE)
    assert steps[0] == ("0.6931", "0.0000") and float(steps[-1][1]) > 0.1
    assert (out / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_grpo_by_hand(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The mean reward rises: answers come to hold the letter that is asked for."""
    rows = [{"messages": row["messages"][:2], "wanted": "a"} for row in tiny.sft_rows(8)]
    data, out = tiny.write_rows(tmp_path / "prompts.jsonl", rows), tmp_path / "adapter"
    grader = tmp_path / "grader.json"
    texts = {"input": "{{ sample.output_text }}", "reference": "{{ item.wanted }}"}
    grader.write_text(json.dumps({"type": "string_check", "name": "a", "operation": "ilike", **texts}))
    args = ("--steps", "15", "--tokens", "8", "--rate", "1e-2", "--out", out)
    said = run("grpo.py", tmp_path, tiny_model_dir, data, grader, *args)
    rewards = [float(x) for x in re.findall(r"^step \d+: mean reward ([\d.]+)", said, re.MULTILINE)]
    assert len(rewards) == 15 and sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.1
    assert (out / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_rlhf_as_one_job(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The three stages run, and the reward model scores what the first and the last of them answer."""
    prompts = [{"prompt": f"Question {i}: what colour is {tiny.THINGS[i % 8]}?"} for i in range(24)]
    rows = {"chats": tiny.sft_rows(16), "pairs": tiny.pair_rows(16), "prompts": prompts[:16], "held_out": prompts[16:]}
    files = [tiny.write_rows(tmp_path / f"{name}.jsonl", some) for name, some in rows.items()]
    said = run("rlhf.py", tmp_path, tiny_model_dir, *files, "--batch", "4", "--tokens", "8")
    assert re.findall(r"^Stage (\d) of 3, '(\w+)',", said, re.MULTILINE) == [
        ("1", "sft"),
        ("2", "reward"),
        ("3", "ppo"),
    ]
    scores = re.findall(r"^(\w+) (ft:\S+): mean score -?[\d.]+ on 8 held-out prompts$", said, re.MULTILINE)
    assert [what for what, _ in scores] == ["supervised", "PPO"] and scores[0][1] != scores[1][1]


def opened(folder: Path, adapter: Path | None = None) -> Any:
    """transformers' own model, with peft's adapter or without."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return model if adapter is None else PeftModel.from_pretrained(model, adapter)


def texts(folder: Path) -> list[Tensor]:
    """[1, T] ids of some rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [row["messages"] for row in tiny.sft_rows(6)]
    return [tokenizer.apply_chat_template(row, return_tensors="pt")["input_ids"] for row in rows]


def mean_loss(folder: Path, adapter: Path | None = None) -> float:
    model = opened(folder, adapter)
    return fmean(model(input_ids=ids, labels=ids).loss.item() for ids in texts(folder))


@torch.no_grad()
def divergence_from(teacher: Path, folder: Path, adapter: Path | None = None) -> float:
    """KL(teacher || student) in nats a token."""
    models = opened(teacher), opened(folder, adapter)
    each = []
    for ids in texts(folder):
        p, q = (model(input_ids=ids).logits[0].log_softmax(-1) for model in models)
        each.append((p.exp() * (p - q)).sum(-1).mean().item())
    return fmean(each)
