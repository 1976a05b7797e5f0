"""Chat beyond the SDK's journey: the exact stream, clients that go away, an engine that dies, too many at once."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest
from live import LiveServer

ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "q1"}], "temperature": 0}
# the tiny tokenizer's token 2 ends an answer
LONG: dict[str, Any] = {**ASK, "logit_bias": {"2": -100}, "max_completion_tokens": 450}
LONGER: dict[str, Any] = {**LONG, "n": 16}


def stats(http: httpx.Client) -> dict[str, Any]:
    """The engine's own numbers; it is started if it is not running."""
    told = http.get("/v1/tunewright/engine").json()
    if told["state"] != "running":
        assert http.post("/v1/chat/completions", json={**ASK, "max_completion_tokens": 1}).status_code == 200
        return stats(http)
    return told["stats"]


def wait_for(condition: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_the_stream_byte_by_byte(http: httpx.Client) -> None:
    body = {**ASK, "max_completion_tokens": 4, "stream": True, "stream_options": {"include_usage": True}, "n": 2}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [e for e in answer.text.split("\n\n") if e != ": ping"]
    assert events[-1] == "" and events[-2] == "data: [DONE]"
    assert all(e.startswith("data: ") and "\n" not in e for e in events[:-1])
    chunks = [json.loads(e[6:]) for e in events[:-2]]
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"} and len({c["id"] for c in chunks}) == 1
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] > 0
    for index in (0, 1):
        mine = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert [c["finish_reason"] is None for c in mine] == [True] * (len(mine) - 1) + [False]
        assert mine[-1]["delta"] == {} and all("role" not in c["delta"] for c in mine[1:])


def test_an_error_before_the_stream_has_its_status(http: httpx.Client) -> None:
    body = {**ASK, "stream": True, "messages": [{"role": "user", "content": "word " * 2000}]}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"


def test_a_client_that_goes_away_stops_the_answer(http: httpx.Client) -> None:
    before = stats(http)["generated_tokens"]
    with http.stream("POST", "/v1/chat/completions", json={**LONGER, "stream": True}) as answer:
        next(answer.iter_bytes())
    wait_for(lambda: stats(http)["running"] == 0)
    assert stats(http)["generated_tokens"] - before < 16 * 450


def test_a_client_that_does_not_wait_for_the_whole_answer(http: httpx.Client, server: LiveServer) -> None:
    before = stats(http)["generated_tokens"]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=LONGER, timeout=httpx.Timeout(300, read=0.3))
    wait_for(lambda: stats(http)["running"] + stats(http)["waiting"] == 0)
    assert stats(http)["generated_tokens"] - before < 16 * 450


@pytest.mark.slow
def test_an_engine_that_dies_is_seen_and_replaced(http: httpx.Client, server: LiveServer) -> None:
    whole = http.post("/v1/chat/completions", json={**ASK, "max_completion_tokens": 6}).json()
    with http.stream("POST", "/v1/chat/completions", json={**LONGER, "stream": True}) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data: "))
        next(lines)
        for process in server.children("tunewright.engine.server"):
            process.kill()
        rest = list(lines)
    error = json.loads(rest[-1].removeprefix("data: "))["error"]
    assert error["code"] == "engine_failed" and "again" in error["message"]
    again = http.post("/v1/chat/completions", json={**ASK, "max_completion_tokens": 6}).json()
    assert "choices" in again, again
    assert again["choices"][0]["message"] == whole["choices"][0]["message"]


@pytest.mark.slow
def test_too_many_at_once_are_told_to_wait(server: LiveServer) -> None:
    async def many() -> list[httpx.Response]:
        body = {**LONG, "max_completion_tokens": 20}
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
            return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for _ in range(80)))

    answers = asyncio.run(many())
    refused = [a for a in answers if a.status_code == 429]
    assert len(answers) - len(refused) >= 64 and {a.status_code for a in answers} == {200, 429}
    for answer in refused:
        assert int(answer.headers["retry-after"]) >= 1 and answer.json()["error"]["code"] == "rate_limit_exceeded"


def test_tools_are_shown_to_the_template(http: httpx.Client) -> None:
    """The tiny template knows no tools; the request must still be valid and answered."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    body = {**ASK, "tools": tools, "tool_choice": "auto", "max_completion_tokens": 4}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    wrong = http.post(
        "/v1/chat/completions", json={**body, "tools": [{"type": "function", "function": {"name": "a b"}}]}
    )
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "tools[0].function.name"
