"""A chain over HTTP: refused in whole, killed inside a stage and between two, seen by the SDK as ordinary jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import install_sdks
import pytest
from live import LiveServer, make_home
from test_recovery import JOBS, events, steps, wait_for

import tiny

pytestmark = pytest.mark.slow
SDK = """
import json, sys, openai
client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", _strict_response_validation=True)
jobs = client.fine_tuning.jobs
chain = jobs.retrieve(sys.argv[2])
print(json.dumps({
    "chain": [chain.id, chain.status, chain.fine_tuned_model, chain.training_file],
    "jobs": [j.id for j in jobs.list()],
    "events": [e.message for e in jobs.list_events(chain.id)],
    "checkpoints": [c.fine_tuned_model_checkpoint for c in jobs.checkpoints.list(chain.id)],
}))
"""


def upload(http: httpx.Client, rows: list[dict[str, Any]], name: str) -> str:
    data = "".join(json.dumps(r) + "\n" for r in rows)
    return http.post("/v1/files", files={"file": (name, data)}, data={"purpose": "fine-tune"}).json()["id"]


def body_of(http: httpx.Client, **own: Any) -> dict[str, Any]:
    """SFT, then from its result a reward model and DPO."""
    pairs = upload(http, tiny.pair_rows(12), "pairs.jsonl")
    stages = [
        {"name": "sft", "n_epochs": 6},
        {"name": "reward", "training_file": pairs, "objective": "reward"},
        {"name": "dpo", "training_file": pairs, "objective": "dpo", "model": "stage:sft"},
    ]
    common = {"tuner": {"name": "lora", "r": 4}, "dtype": "float32", "threads": 1, "n_epochs": 1, "batch_size": 2}
    numbers = {k: common.pop(k) for k in ("n_epochs", "batch_size")}
    return {
        "model": "tiny",
        "training_file": upload(http, tiny.sft_rows(12), "chats.jsonl"),
        "seed": 1,
        "hyperparameters": numbers,
        "tunewright": {**common, "stages": stages, **own},
    }


def sdk(server: LiveServer, chain: str) -> dict[str, Any]:
    version = install_sdks.VERSIONS[0]
    if not install_sdks.installed(version):
        pytest.skip(f"openai {version} is not installed: run `make sdks`")
    env = {**os.environ, "PYTHONPATH": str(install_sdks.folder() / version)}
    done = subprocess.run([sys.executable, "-c", SDK, server.url, chain], capture_output=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_chain_survives_kills_and_repeats_nothing(tmp_path: Path, tiny_model_dir: Path, described: Path) -> None:
    home = make_home(tmp_path / "home", tiny_model_dir, described)
    with LiveServer(home, "--open") as mine, httpx.Client(base_url=mine.url, timeout=300) as http:

        def job(job_id: str) -> dict[str, Any]:
            return http.get(f"{JOBS}/{job_id}").json()

        def stage(number: int) -> dict[str, Any]:
            return job(made["id"])["tunewright"]["stages"][number]

        refused(http)
        made = http.post(JOBS, json=body_of(http)).json()
        assert (made["object"], made["status"], made["model"]) == ("fine_tuning.job", "validating_files", "tiny")
        assert [s["status"] for s in made["tunewright"]["stages"]] == ["waiting"] * 3
        wait_for(lambda: stage(0)["id"] and len(steps(http, stage(0)["id"])) >= 3)
        mine.kill()
        mine.start()
        wait_for(lambda: stage(0)["status"] == "succeeded")
        mine.kill()
        mine.start()
        wait_for(lambda: job(made["id"])["status"] in ("succeeded", "failed"))
        done = job(made["id"])
        assert done["status"] == "succeeded", done["error"]
        stages = done["tunewright"]["stages"]
        assert done["fine_tuned_model"] == stages[2]["fine_tuned_model"] and done["trained_tokens"] > 0
        assert steps(http, stages[0]["id"]) == list(range(1, 37))
        assert job(stages[2]["id"])["model"] == stages[0]["fine_tuned_model"]
        assert job(stages[2]["id"])["tunewright"]["tuner"]["r"] == 4
        assert job(stages[2]["id"])["method"]["type"] == "dpo"
        first = next(e for e in events(http, stages[2]["id"]) if e["type"] == "metrics")
        assert abs(first["data"]["train_loss"] - 0.6931) < 1e-3
        ask = {"model": done["fine_tuned_model"], "messages": [{"role": "user", "content": "q"}], "max_tokens": 3}
        assert http.post("/v1/chat/completions", json=ask).status_code == 200
        told = sdk(mine, made["id"])
        assert told["chain"] == [made["id"], "succeeded", done["fine_tuned_model"], made["training_file"]]
        assert sorted(told["jobs"]) == sorted([made["id"], *(s["id"] for s in stages)])
        assert sum("has begun" in message for message in told["events"]) == 3
        assert told["checkpoints"][0] == done["fine_tuned_model"]


def refused(http: httpx.Client) -> None:
    """What is wrong anywhere in a chain is said before anything is made."""
    right = body_of(http)
    own = right["tunewright"]

    def said(body: dict[str, Any]) -> str:
        answer = http.post(JOBS, json=body)
        assert answer.status_code == 400, answer.text
        report = http.post("/v1/tunewright/jobs/check", json=body).json()
        assert (report["usable"], report["message"]) == (False, answer.json()["error"]["message"])
        return report["message"]

    def with_last(**fields: Any) -> dict[str, Any]:
        stages = [*own["stages"][:2], {**own["stages"][2], **fields}]
        return {**right, "tunewright": {**own, "stages": stages}}

    assert http.post("/v1/tunewright/jobs/check", json=right).json()["usable"]
    assert "Stage 'dpo': model names the stage 'stf'" in said(with_last(model="stage:stf"))
    assert "Stage 'dpo': No such File object: file-none" in said(with_last(training_file="file-none"))
    assert "Stage 'dpo': The job spec is not valid: objective 'dpo'" in said(
        with_last(objective={"name": "dpo", "bet": 1})
    )
    assert "model names 'reward', whose model has the head 'reward'" in said(with_last(model="stage:reward"))
    assert "Stage 'dpo': Model tinny is not available" in said(with_last(model="tinny"))
    assert "Leave 'method' out" in said({**right, "method": {"type": "supervised"}})
    assert "'tunewright.seed' has its own place" in said({**right, "tunewright": {**own, "seed": 1}})
    assert http.get(JOBS).json()["data"] == []
