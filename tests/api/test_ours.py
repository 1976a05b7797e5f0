"""/v1/tunewright/* and /healthz."""

from __future__ import annotations

import json
import time
from importlib.util import find_spec

import httpx

import tiny


def upload(http: httpx.Client, rows: list, name: str = "train.jsonl") -> str:
    data = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows).encode()
    answer = http.post("/v1/files", files={"file": (name, data)}, data={"purpose": "fine-tune"})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def test_health(http: httpx.Client) -> None:
    answer = http.get("/healthz")
    health = answer.json()
    assert answer.status_code == 200 and health["status"] == "ready"
    assert health["database"] == "ok" and health["supervisor"] == "running"
    assert health["engine"] in ("running", "stopped") and health["version"]


def test_describe_has_all_that_a_form_needs(http: httpx.Client) -> None:
    told = http.get("/v1/tunewright/describe").json()
    assert told["parts"]["tuner"]["lora"]["schema"]["properties"]["r"] and told["parts"]["objective"]["sft"]["card"]
    assert {"optimizer", "schedule"} <= told["parts"].keys() and told["spec"]["properties"]["n_epochs"]
    models = {m["id"]: m for m in told["models"]}
    assert models["tiny"]["ready"] is True and models["tiny"]["needs_network"] is False


def test_describe_has_the_ways_to_hold_a_base_and_the_recipes(http: httpx.Client) -> None:
    parts = http.get("/v1/tunewright/describe").json()["parts"]
    held = parts["quantization"]
    assert list(held) == ["auto", "none", "nf4", "int8"] and held["nf4"]["card"]["frozen"] and held["auto"]["doc"]
    here = find_spec("bitsandbytes") is not None
    assert held["nf4"]["missing"] == (None if here else "bitsandbytes") and held["none"]["missing"] is None
    assert parts["tuner"]["prefix"]["missing"] is None and parts["retain"]["replay"]["card"]["rows"] == "required"
    assert parts["recipe"]["proxy"]["card"]["models"] == ["tuned", "small"]
    assert "tuned" not in parts["recipe"]["proxy"]["defaults"] and parts["recipe"]["few_shot"]["defaults"]["k"] == 4


def test_a_job_is_checked_without_being_made(http: httpx.Client) -> None:
    """The same words as POST /v1/fine_tuning/jobs, and no job."""
    body = {"model": "tiny", "training_file": upload(http, tiny.sft_rows(12))}
    before = http.get("/v1/fine_tuning/jobs").json()["data"]
    good = http.post("/v1/tunewright/jobs/check", json=body).json()
    assert good == {"object": "tunewright.job_check", "usable": True, "message": "", "param": None}
    cases = [
        {"tunewright": {"tuner": "full", "quantization": "nf4"}},
        {"tunewright": {"tuner": "lorra"}},
        {"tunewright": {"retain": ["replay"]}},
        {"tunewright": {"mix": ["file-none"]}},
        {"model": "tinny"},
        {"suffix": "a/b"},
    ]
    for wrong in cases:
        told = http.post("/v1/tunewright/jobs/check", json={**body, **wrong}).json()
        refused = http.post("/v1/fine_tuning/jobs", json={**body, **wrong})
        assert refused.status_code == 400 and not told["usable"], wrong
        assert (told["message"], told["param"]) == (
            refused.json()["error"]["message"],
            refused.json()["error"]["param"],
        )
    assert http.get("/v1/fine_tuning/jobs").json()["data"] == before


def test_check_of_a_good_file(http: httpx.Client) -> None:
    file_id = upload(http, tiny.sft_rows(12))
    report = http.post(f"/v1/tunewright/files/{file_id}/check").json()
    assert report["usable"] and report["message"] == "" and report["problems"] == []
    assert report["n_rows"] == 12 and report["shape"] == "chat" and report["format"] and report["reason"]


def test_check_names_every_line(http: httpx.Client) -> None:
    rows = tiny.sft_rows(12)
    rows[2]["messages"][1]["role"] = "assistent"
    del rows[7]["messages"][2]["content"]
    report = http.post(f"/v1/tunewright/files/{upload(http, rows)}/check", json={}).json()
    assert not report["usable"] and report["n_problems"] >= 2
    found = {p["line"]: p for p in report["problems"]}
    assert found.keys() == {3, 8} and "assistent" in found[3]["message"] and "messages[1].role" in found[3]["field"]
    assert report["message"]


def test_check_counts_rows(http: httpx.Client) -> None:
    file_id = upload(http, tiny.sft_rows(3))
    assert "3 example(s)" in http.post(f"/v1/tunewright/files/{file_id}/check").json()["message"]
    assert http.post(f"/v1/tunewright/files/{file_id}/check", json={"min_examples": 3}).json()["usable"]
    wrong = http.post(f"/v1/tunewright/files/{file_id}/check", json={"format": "sharegtp"})
    assert wrong.status_code == 400 and "sharegpt" in wrong.json()["error"]["message"]
    assert http.post("/v1/tunewright/files/file-x/check").status_code == 404


def test_create_is_idempotent_with_a_key(http: httpx.Client) -> None:
    body = {"model": "tiny", "training_file": upload(http, tiny.sft_rows(3))}  # too few rows: it trains nothing
    key = {"idempotency-key": f"k{time.time_ns()}"}
    first, second = (http.post("/v1/fine_tuning/jobs", json=body, headers=key).json() for _ in range(2))
    assert first["id"] == second["id"]
    other = http.post("/v1/fine_tuning/jobs", json={**body, "seed": 1}, headers=key)
    assert other.status_code == 400 and other.json()["error"]["code"] == "idempotency_key_reused"
    assert http.post("/v1/fine_tuning/jobs", json=body).json()["id"] != first["id"]


def test_a_refused_create_leaves_nothing(http: httpx.Client, server) -> None:
    before = sorted(p.name for p in (server.home / "runs").iterdir())
    body = {"model": "tiny", "training_file": upload(http, tiny.sft_rows(3)), "suffix": "a b"}
    assert http.post("/v1/fine_tuning/jobs", json=body).status_code == 400
    assert sorted(p.name for p in (server.home / "runs").iterdir()) == before


def test_metrics_of_an_unknown_job(http: httpx.Client) -> None:
    assert http.get("/v1/tunewright/jobs/ftjob-x/metrics").status_code == 404


def test_a_job_with_retained_and_mixed_files(http: httpx.Client, server) -> None:
    """They are file ids in the `tunewright` object; the run has its own copies."""
    train, old, more = (upload(http, tiny.sft_rows(n), f"{n}.jsonl") for n in (3, 4, 5))  # too few rows: trains nothing
    own = {"retain": [{"name": "replay", "file": old}, {"name": "l2sp"}], "mix": {"files": [more], "temperature": 2}}
    answer = http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": train, "tunewright": own})
    assert answer.status_code == 200, answer.text
    told = answer.json()["tunewright"]
    assert told["retain"][0] == {"name": "replay", "file": old, "coefficient": 1.0, "share": 0.25}
    assert told["mix"]["files"] == [{"file": more, "weight": None}]
    job = json.loads((server.home / "runs" / answer.json()["id"] / "job.json").read_text())
    assert set(job["more"]) == {"retain-1", "mix-1"} and job["sources"]["mix-1"]["name"] == "5.jsonl"
    own["retain"][0]["file"] = "file-none"
    wrong = http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": train, "tunewright": own})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "tunewright.retain"
