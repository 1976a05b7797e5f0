"""kill -9 of the server while a job trains: nothing is lost, nothing is told twice, the job goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import LiveServer, make_home

import tiny

JOBS = "/v1/fine_tuning/jobs"


def events(http: httpx.Client, job_id: str) -> list[dict[str, Any]]:
    """Oldest first."""
    return http.get(f"{JOBS}/{job_id}/events?limit=5000").json()["data"][::-1]


def steps(http: httpx.Client, job_id: str) -> list[int]:
    return [e["data"]["step"] for e in events(http, job_id) if e["type"] == "metrics"]


def wait_for(condition: Any, seconds: float = 400.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


@pytest.mark.slow
def test_kill_9_of_the_server_while_a_job_trains(tmp_path: Path, tiny_model_dir: Path, described: Path) -> None:
    home = make_home(tmp_path / "home", tiny_model_dir, described)
    data = "".join(json.dumps(r) + "\n" for r in tiny.sft_rows(12))
    with LiveServer(home, "--open") as mine, httpx.Client(base_url=mine.url, timeout=300) as http:
        made = http.post("/v1/files", files={"file": ("t.jsonl", data)}, data={"purpose": "fine-tune"}).json()
        body = {"model": "tiny", "training_file": made["id"], "hyperparameters": {"n_epochs": 15, "batch_size": 1}}
        job = http.post(JOBS, json=body).json()
        wait_for(lambda: len(steps(http, job["id"])) >= 8)
        before = events(http, job["id"])
        mine.kill()
        mine.start()
        http.get("/v1/models")
        after = events(http, job["id"])
        assert [e["id"] for e in before] == [e["id"] for e in after][: len(before)]
        assert http.get(f"/v1/files/{made['id']}/content").text == data
        wait_for(lambda: http.get(f"{JOBS}/{job['id']}").json()["status"] in ("succeeded", "failed"))
        done = http.get(f"{JOBS}/{job['id']}").json()
        assert done["status"] == "succeeded", done["error"]
        assert steps(http, job["id"]) == list(range(1, 181))
        points = http.get(f"/v1/tunewright/jobs/{job['id']}/metrics?after_step=170").json()["data"]
        assert [p["step"] for p in points] == list(range(171, 181))
        ask = {"model": done["fine_tuned_model"], "messages": [{"role": "user", "content": "q"}], "max_tokens": 3}
        assert http.post("/v1/chat/completions", json=ask).status_code == 200
        mine.kill()
        mine.start()
        assert http.get(f"{JOBS}/{job['id']}").json() == done
        assert http.post("/v1/chat/completions", json=ask).status_code == 200
