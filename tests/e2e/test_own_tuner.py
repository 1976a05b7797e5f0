"""A tuner from somebody else's package: one file and one line, and it is listed, trained by a real job and served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tiny
from tunewright.core.errors import SpecError
from tunewright.core.home import Home
from tunewright.core.run import list_runs, read_artefact
from tunewright.engine.engine import Engine
from tunewright.engine.request import parse_request
from tunewright.jobs import describe as described
from tunewright.tuners import TUNERS
from tunewright.tuners.base import TunerCard

FILE = '''
"""Loud LoRA: LoRA on queries and values whose update counts `gain` times."""

from typing import ClassVar

from peft import LoraConfig
from pydantic import Field

from tunewright.tuners import base
from tunewright.tuners.peft_adapter import PeftTuner


class Loud(PeftTuner):
    """LoRA on queries and values only, louder."""

    class Options(base.Options):
        r: int = Field(4, ge=1, le=64, description="rank of the update")
        gain: float = Field(2.0, gt=0, le=100, description="how much the update counts")

    card: ClassVar[base.TunerCard] = base.TunerCard(
        title="Loud LoRA", artefact="adapter", mergeable=True, identity_at_start=True, works_on_nf4=True,
        default_lr=1e-3,
    )

    def config(self, model, seed):
        o = self.options
        return LoraConfig(
            r=o.r, lora_alpha=o.gain * o.r, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", bias="none"
        )
'''
LINE = "loud = loud_tuner:Loud"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH, as pip would leave it."""
    folder = tmp_path / "site"
    info = folder / "loud_tuner-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "loud_tuner.py").write_text(FILE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loud-tuner\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[tunewright.tuner]\n{LINE}\n")
    return folder


@pytest.fixture
def env(package: Path, tiny_home: Home) -> dict[str, str]:
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    root = str(tiny_home.root)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TUNEWRIGHT_HOME": root, "OMP_NUM_THREADS": "1"}


def test_the_table_lists_it_beside_ours(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = described._digest()
    monkeypatch.syspath_prepend(str(package))
    assert "loud" in list(TUNERS) and "lora" in list(TUNERS)
    assert TUNERS.load("loud").card == TunerCard("Loud LoRA", "adapter", True, True, True, 1e-3)
    assert described._digest() != before  # so what API, form and command line read is made anew
    with pytest.raises(SpecError, match="Did you mean 'loud'"):
        TUNERS.load("lowd")
    monkeypatch.undo()
    assert "loud" not in list(TUNERS)


@pytest.mark.slow
def test_a_job_trains_with_it_and_the_result_is_served(env: dict[str, str], tiny_home: Home, tmp_path: Path) -> None:
    """The command and the worker are processes of their own, which know of it by its line alone."""
    tiny.write_rows(tmp_path / "train.jsonl", tiny.sft_rows(20))
    job = tmp_path / "job.yaml"
    job.write_text(
        "model: tiny\ntraining_file: train.jsonl\ntuner: {name: loud, gain: 3}\nn_epochs: 6\nbatch_size: 5\n"
        "learning_rate_multiplier: 5\ndtype: float32\nthreads: 1\nseed: 1\nsuffix: own\n"
    )
    command = [sys.executable, "-m", "tunewright.cli.main"]
    wrong = subprocess.run([*command, "train", str(job), "--set", "tuner.gain=-1"], env=env, capture_output=True)
    assert wrong.returncode == SpecError.exit_code and b"tuner 'loud', option 'gain'" in wrong.stderr
    done = subprocess.run([*command, "train", str(job)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = list_runs(tiny_home)
    losses = [e.data["train_loss"] for e in run.events() if e.type == "metrics"]
    assert losses[-1] < losses[0] - 0.05
    assert read_artefact(run.result).tuner == {"name": "loud", "r": 4, "gain": 3}

    listed = subprocess.run([*command, "models"], env=env, capture_output=True, text=True, check=True).stdout
    assert run.job().name in listed
    (cached,) = (tiny_home.root / "cache").glob("describe-*.json")
    row = json.loads(cached.read_text())["tuner"]["loud"]
    assert row["defaults"] == {"r": 4, "gain": 2.0} and row["card"]["title"] == "Loud LoRA"
    assert row["schema"]["properties"]["gain"]["exclusiveMinimum"] == 0

    assert answer(tiny_home, run.result) == by_peft(tiny_home.models / "tiny", run.result)


def answer(home: Home, artefact: Path) -> list[int]:
    engine, log = Engine(home, dtype="float32", threads=1), []
    asked = {"artefact": str(artefact), "prompt": [5, 17, 300, 41], "max_tokens": 6, "temperature": 0.0}
    engine.add_request(parse_request(asked), log.append)
    while engine.step():
        pass
    return [e["token_id"] for e in log if e["type"] == "token"]


def by_peft(base: Path, artefact: Path) -> list[int]:
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), artefact)
    ids = torch.tensor([[5, 17, 300, 41]])
    out = model.eval().generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 4:].tolist()
    end = model.config.eos_token_id
    return out[: out.index(end)] if end in out else out
