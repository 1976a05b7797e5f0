"""A chain in a terminal: real workers, Ctrl-C in a stage, a stage that fails and is done again, a server afterwards."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny
from tunewright.core.durable import sha256_file
from tunewright.core.home import Home
from tunewright.core.run import Run, list_runs, read_artefact
from tunewright.jobs.store import Store
from tunewright.jobs.supervisor import Supervisor

pytestmark = pytest.mark.slow
COMMAND = [sys.executable, "-m", "tunewright.cli.main", "train"]
CHAIN = """
model: tiny
batch_size: 4
dtype: float32
threads: 1
seed: 1
tuner: {name: lora, r: 4}
stages:
  - {name: sft, training_file: chats.jsonl, n_epochs: 1}
  - {name: reward, training_file: pairs.jsonl, objective: reward, n_epochs: 1}
  - {name: dpo, training_file: pairs.jsonl, objective: dpo, model: "stage:sft", n_epochs: 50}
"""

RLHF = """
chain: rlhf
model: tiny
batch_size: 4
n_epochs: 1
dtype: float32
threads: 1
seed: 1
tuner: {name: lora, r: 4}
stages:
  sft: chats.jsonl
  reward: pairs.jsonl
  ppo: {training_file: prompts.jsonl, objective: {max_completion_tokens: 8}}
"""


@pytest.fixture
def env(tiny_home: Home) -> dict[str, str]:
    return {**os.environ, "TUNEWRIGHT_HOME": str(tiny_home.root), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    tiny.write_rows(tmp_path / "chats.jsonl", tiny.sft_rows(12))
    tiny.write_rows(tmp_path / "pairs.jsonl", tiny.pair_rows(12))
    path = tmp_path / "chain.yaml"
    path.write_text(CHAIN)
    return path


def stage(home: Home, name: str) -> Run | None:
    return next((r for r in list_runs(home) if r.job().chain.get("stage") == name), None)


def start(env: dict[str, str], *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*COMMAND, *args], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(process: subprocess.Popen[str], home: Home, name: str, attempt: int) -> Run:
    end = time.monotonic() + 300
    while True:
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        run = stage(home, name)
        if run is not None and any(e.type == "metrics" and e.attempt == attempt for e in run.all_events()):
            return run
        time.sleep(0.05)


@pytest.mark.nightly
def test_a_chain_is_stopped_in_stage_3_and_goes_on_there(env: dict[str, str], chain: Path, tiny_home: Home) -> None:
    first = start(env, str(chain))
    dpo = wait_for_step(first, tiny_home, "dpo", 1)
    first.send_signal(signal.SIGINT)
    out, _ = first.communicate(timeout=300)
    assert first.returncode == 75, out
    assert re.findall(r"^Stage (\d) of 3, '(\w+)', is the job ftjob-", out, re.M) == [
        ("1", "sft"), ("2", "reward"), ("3", "dpo"),
    ]  # fmt: skip
    found = re.search(r"To continue: +tunewright train --resume (ftjob-\w+)\n", out)
    assert found, out
    whole = Run(tiny_home.runs / found[1])
    assert list(whole.job().stages) == ["sft", "reward", "dpo"]
    runs = {name: stage(tiny_home, name) for name in ("sft", "reward")}
    before = {name: sha256_file(run.result / "adapter_model.safetensors") for name, run in runs.items() if run}

    again = start(env, "--resume", whole.id)
    wait_for_step(again, tiny_home, "dpo", 2)
    again.kill()  # the worker lives on in a session of its own
    again.communicate()
    end = time.monotonic() + 300
    while dpo.end() is None or (dpo.end() or dpo).data["status"] != "succeeded":  # type: ignore[union-attr]
        assert time.monotonic() < end
        time.sleep(0.1)
    assert [dpo.attempts(), *(r.attempts() for r in runs.values() if r)] == [[1, 2], [1], [1]]
    assert before == {n: sha256_file(r.result / "adapter_model.safetensors") for n, r in runs.items() if r}
    assert [e.data["step"] for e in dpo.events() if e.type == "metrics"] == list(range(1, 151))
    done = start(env, "--resume", whole.id)
    assert f"has finished; its model is {dpo.job().name}" in done.communicate(timeout=120)[0]

    store = Store.open(tiny_home)
    try:
        boss = Supervisor(store, tiny_home)
        while (row := store.get_job(whole.id)) is None or row.status == "running":
            boss.tick()
            assert time.monotonic() < end + 60
            time.sleep(0.05)
        assert (row.status, row.started_by) == ("succeeded", "foreground")
        assert (row.tunewright or {})["stages"][2]["fine_tuned_model"] == dpo.job().name
    finally:
        store.close()


def test_everything_is_checked_before_anything_is_trained(env: dict[str, str], chain: Path, tiny_home: Home) -> None:
    chain.write_text(CHAIN.replace('"stage:sft"', '"stage:stf"'))
    out, _ = start(env, str(chain)).communicate(timeout=120)
    assert "Stage 'dpo': model names the stage 'stf', which does not exist" in out and "Did you mean 'sft'?" in out
    chain.write_text(CHAIN.replace("objective: dpo", "objective: {name: dpo, beta: -1}"))
    out, _ = start(env, str(chain)).communicate(timeout=120)
    assert "Stage 'dpo': The job spec is not valid: objective 'dpo', option 'beta' is -1" in out
    chain.write_text(CHAIN)
    with open(chain.parent / "pairs.jsonl", "a") as f:
        f.write("{}\n")
    out, _ = start(env, str(chain)).communicate(timeout=120)
    assert "Stage 'reward': " in out and "pairs.jsonl line 13" in out
    assert list_runs(tiny_home) == []


def test_rlhf_as_one_job(env: dict[str, str], chain: Path, tiny_home: Home) -> None:
    """PPO starts from the supervised model and is rewarded by the reward model that the stage before it left."""
    tiny.write_rows(
        chain.parent / "prompts.jsonl", [{"prompt": f"What colour is {thing}?"} for thing in tiny.THINGS * 2]
    )
    chain.write_text(RLHF)
    process = start(env, str(chain))
    out, _ = process.communicate(timeout=500)
    assert process.returncode == 0, out
    sft, reward, ppo = (stage(tiny_home, name) for name in ("sft", "reward", "ppo"))
    assert sft and reward and ppo
    assert ppo.job().spec.model == reward.job().spec.model == sft.job().name
    assert read_artefact(ppo.folder / "start").name == sft.job().name
    assert read_artefact(ppo.folder / "teacher").name == reward.job().name
    assert f"Done. The model is {ppo.job().name}" in out
    steps = [e.data for e in ppo.events() if e.type == "metrics"]
    assert len(steps) == 4 and all("train_mean_reward" in s for s in steps)
