"""Classifiers and reward models through the whole server: trained by a job, listed, asked in a chat, refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import LiveServer

import tiny

pytestmark = pytest.mark.slow

TEXT = "Number 3: the sky is red"
SAID = [{"role": "user", "content": "What colour?"}, {"role": "assistant", "content": "It is red."}]


def rows_for(head: str) -> list[dict[str, Any]]:
    if head == "reward":
        pair = {"preferred_output": "It is red.", "non_preferred_output": "No."}
        answers = {k: [{"role": "assistant", "content": v}] for k, v in pair.items()}
        return [
            {"input": {"messages": [{"role": "user", "content": f"What colour is {i}?"}]}, **answers} for i in range(12)
        ]
    rows = tiny.label_rows(18)
    return [{**r, "label": [r["label"]]} for r in rows] if head == "multilabel" else rows


def trained(http: httpx.Client, model: str, tuner: str, head: str) -> str:
    """The name of the model that a job of one epoch leaves."""
    text = "".join(json.dumps(r) + "\n" for r in rows_for(head))
    upload = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", text.encode())})
    ours = {"head": head, "tuner": tuner, "threads": 1, "dtype": "float32"}
    hyper = {"n_epochs": 1, "batch_size": 6}
    body = {"model": model, "training_file": upload.json()["id"], "hyperparameters": hyper, "tunewright": ours}
    answer = http.post("/v1/fine_tuning/jobs", json=body)
    assert answer.status_code == 200, answer.text
    job, end = answer.json(), time.monotonic() + 300
    assert job["tunewright"]["objective"]["name"] == head
    while job["status"] not in ("succeeded", "failed", "cancelled"):
        assert time.monotonic() < end, job
        time.sleep(0.2)
        job = http.get(f"/v1/fine_tuning/jobs/{job['id']}").json()
    assert job["status"] == "succeeded", job
    return job["fine_tuned_model"]


def post(http: httpx.Client, path: str, **body: Any) -> httpx.Response:
    return http.post(f"/v1/{path}", json=body)


PARTS = {
    "classify": ("bert", "full", "classify"),
    "reward": ("tiny", "lora", "reward"),
    "multilabel": ("tiny", "full", "multilabel"),
    "bert reward": ("bert", "lora", "reward"),
}


@pytest.fixture(scope="module")
def name_of(server: LiveServer) -> Callable[[str], str]:
    """The model of PARTS that has this name here, trained when it is first asked for."""
    tiny.build_reader(Path(server.home) / "models" / "bert", "bert")

    @cache
    def find(which: str) -> str:
        with httpx.Client(base_url=server.url, timeout=300) as http:
            return trained(http, *PARTS[which])

    return find


def test_a_classifier(http: httpx.Client, name_of: Callable[[str], str]) -> None:
    name = name_of("classify")
    pair = {"text": "the sky", "text_pair": "Is it so?"}
    found = post(http, "tunewright/classify", model=name, input=[TEXT, pair]).json()
    assert found["object"] == "list" and found["model"] == name
    first, second = found["data"]
    assert set(first) == {"object", "index", "label", "distribution"} and (first["index"], second["index"]) == (0, 1)
    assert list(first["distribution"]) == ["blue", "green", "red"]
    assert sum(first["distribution"].values()) == pytest.approx(1.0, abs=1e-4)
    assert first["label"] == max(first["distribution"], key=first["distribution"].__getitem__)
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] > 0

    messages = [{"role": "user", "content": TEXT}]
    asked = {"model": name, "messages": messages, "logprobs": True, "top_logprobs": 3}
    whole = post(http, "chat/completions", **asked).json()["choices"][0]
    assert whole["message"]["content"] == first["label"] and whole["finish_reason"] == "stop"
    assert {t["token"] for t in whole["logprobs"]["content"][0]["top_logprobs"]} == set(first["distribution"])
    streamed = post(http, "chat/completions", model=name, messages=messages, stream=True).text
    chunks = [json.loads(e[6:]) for e in streamed.split("\n\n") if e.startswith("data: {")]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == first["label"]
    assert name in [m["id"] for m in http.get("/v1/models").json()["data"]]


@pytest.mark.nightly
def test_several_classes(http: httpx.Client, name_of: Callable[[str], str]) -> None:
    (found,) = post(http, "tunewright/classify", model=name_of("multilabel"), input=TEXT).json()["data"]
    assert found["labels"] == [k for k, p in found["distribution"].items() if p > 0.5]


@pytest.mark.parametrize("which", ["reward", pytest.param("bert reward", marks=pytest.mark.nightly)])
def test_a_reward_model(http: httpx.Client, name_of: Callable[[str], str], which: str) -> None:
    name = name_of(which)
    one = post(http, "tunewright/score", model=name, input=SAID).json()["data"]
    two = post(http, "tunewright/score", model=name, input=[SAID, SAID]).json()["data"]
    assert set(one[0]) == {"object", "index", "score"} and len(two) == 2
    assert two[1]["score"] == pytest.approx(one[0]["score"], abs=0.02)
    said = post(http, "chat/completions", model=name, messages=SAID).json()["choices"][0]["message"]["content"]
    assert float(said) == pytest.approx(one[0]["score"], abs=0.02)


def test_a_teacher_is_a_model_of_this_server_and_an_endpoint_is_listed(http: httpx.Client) -> None:
    """A client can name neither a path nor a server of its own choice."""
    text = "".join(json.dumps(r) + "\n" for r in tiny.sft_rows(12))
    upload = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", text.encode())})
    body = {"model": "tiny", "training_file": upload.json()["id"]}
    for objective, code in (
        ({"name": "distill", "teacher": "/etc"}, "model_not_available"),
        ({"name": "distill"}, "invalid_value"),
        ({"name": "answers", "endpoint": "http://127.0.0.1:1/v1", "model": "m"}, "endpoint_not_allowed"),
    ):
        answer = http.post("/v1/fine_tuning/jobs", json={**body, "tunewright": {"objective": objective}})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == code, answer.text


def test_errors_have_openais_shape(http: httpx.Client, name_of: Callable[[str], str]) -> None:
    user = [{"role": "user", "content": "x"}]
    cases = [
        ("tunewright/classify", {"model": "tiny", "input": "x"}, 400, "unsupported_model"),
        ("tunewright/classify", {"model": name_of("reward"), "input": "x"}, 400, "unsupported_model"),
        ("tunewright/score", {"model": name_of("classify"), "input": SAID}, 400, "unsupported_model"),
        ("tunewright/score", {"model": name_of("reward"), "input": user}, 400, "invalid_value"),
        ("tunewright/classify", {"model": "nobody", "input": "x"}, 404, "model_not_found"),
        ("tunewright/classify", {"model": name_of("classify"), "input": []}, 400, "array_below_min_length"),
        ("tunewright/classify", {"model": name_of("classify"), "inputs": "x"}, 400, None),
        ("tunewright/classify", {"model": name_of("classify"), "input": "red " * 600}, 400, "context_length_exceeded"),
        ("chat/completions", {"model": name_of("classify"), "messages": SAID}, 400, "invalid_value"),
    ]
    for path, body, status, code in cases:
        answer = post(http, path, **body)
        error = answer.json()["error"]
        assert answer.status_code == status, (body, answer.text)
        assert {"message", "type", "param", "code"} <= error.keys() and error["type"] == "invalid_request_error"
        assert code is None or error["code"] == code, error
