"""The engine as a real process: started, asked over HTTP, killed, restarted; streams that break off; a wrong token."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import engine_kit as kit
from tunewright.core.errors import Busy, ModelNotFound, UserError
from tunewright.core.home import Home
from tunewright.engine.client import DEATHS, EngineFailed, EngineProcess, EngineSession, Reply, as_error, payload

CHAT = [{"role": "user", "content": "Question 3: what colour is the sea?"}]
LONG = {"base": kit.BASE, "prompt": [5, 6, 7], "logit_bias": {2: -100}, "temperature": 0.0}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kit.make_model(tmp_path_factory.mktemp("lively") / "tiny", max_position_embeddings=8192)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Home:
    return kit.make_home(tmp_path_factory.mktemp("engine") / "home", model_dir)


@pytest.fixture(scope="module")
def session(home: Home) -> Iterator[EngineSession]:
    with EngineSession(home, threads=1, dtype="float32") as session:
        yield session


@pytest.fixture(scope="module")
def process(session: EngineSession) -> EngineProcess:
    """The session's process, running."""
    session.process.ensure_now()
    return session.process


async def health_when(process: EngineProcess, ready: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    for _ in range(600):
        health = await process.health()
        if ready(health):
            return health
        await asyncio.sleep(0.05)
    raise AssertionError(health)


def test_chat_over_http_is_generate(session: EngineSession, model_dir: Path) -> None:
    from tunewright.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(model_dir)
    wanted = kit.reference(kit.hf_model(model_dir), tokenizer.encode_chat(CHAT), 20)
    assert session.chat(CHAT, base=kit.BASE, temperature=0.0, max_tokens=20) == tokenizer.decode(wanted)
    events = list(session.stream({"base": kit.BASE, "messages": CHAT, "temperature": 0.0, "max_tokens": 20}))
    assert [e["token_id"] for e in events[1:-1]] == wanted
    assert events[-1]["usage"]["completion_tokens"] == 20


def test_many_at_once_come_back_in_order(session: EngineSession, tmp_path: Path, model_dir: Path) -> None:
    adapter = kit.make_adapter(tmp_path / "adapter", model_dir, 1)
    requests: list[Any] = [
        payload(
            [{"role": "user", "content": f"Question {i}"}],
            kit.BASE,
            adapter if i % 2 else None,
            temperature=0.0,
            max_tokens=8,
        )
        for i in range(12)
    ]
    requests[5] = {**requests[5], "temperature": 9}
    replies = list(session.chat_many(requests, concurrency=6))
    assert isinstance(replies[5], UserError) and "temperature" in replies[5].message
    for i, reply in enumerate(replies):
        if i != 5:
            assert isinstance(reply, Reply) and reply == session.reply(requests[i])
    assert len({r.text for r in replies if isinstance(r, Reply)}) > 6


def test_only_with_the_token(process: EngineProcess) -> None:
    child = process.ensure_now()
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": child.token}):
        for method, path in (("GET", "/health"), ("POST", "/generate"), ("GET", "/docs"), ("POST", "/nothing")):
            answer = httpx.request(method, child.url + path, headers=headers, json={} if method == "POST" else None)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert child.url.startswith("http://127.0.0.1:")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"not json", 400, "invalid_json"),
        (b"[1]", 400, "invalid_json"),
        (b"{}", 400, "invalid_value"),
        (b'{"base": "tinny", "prompt": "x"}', 404, "model_not_found"),
        (b'{"base": "tiny", "messages": [{"content": "no role"}]}', 400, "chat_template_error"),
        (b'{"base": "tiny", "prompt": "x", "prompt_embeds": "x"}', 400, "invalid_value"),
    ],
)
def test_every_error_is_json(process: EngineProcess, body: bytes, status: int, code: str) -> None:
    child = process.ensure_now()
    answer = httpx.post(f"{child.url}/generate", content=body, headers={"Authorization": f"Bearer {child.token}"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert "Traceback" not in answer.text
    missing = httpx.get(f"{child.url}/nothing", headers={"Authorization": f"Bearer {child.token}"})
    assert missing.status_code == 404 and "message" in missing.json()["error"]


def test_errors_keep_their_kind(session: EngineSession, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        session.chat(CHAT, artefact=tmp_path / "nothing")
    with pytest.raises(UserError) as e:
        session.chat([{"role": "user", "content": "word " * 9000}], base=kit.BASE)
    assert e.value.code == "context_length_exceeded"
    assert isinstance(as_error(b'{"error": {"message": "full", "code": "queue_full"}}', 503), Busy)
    assert isinstance(as_error(b"<html>", 502), EngineFailed)


def test_a_client_that_goes_away_frees_its_request(process: EngineProcess) -> None:
    async def work(p: EngineProcess) -> None:
        stream = p.generate(LONG)
        seen = [await anext(stream) for _ in range(4)]
        assert [e["type"] for e in seen] == ["start", "token", "token", "token"]
        assert (await p.health())["running"] == 1
        await stream.aclose()
        health = await health_when(p, lambda h: h["running"] == 0)
        assert health["kv_bytes"] == 0 and health["waiting"] == 0

    asyncio.run(work(process))


def test_a_cancelled_task_frees_its_request(process: EngineProcess) -> None:
    async def work(p: EngineProcess) -> None:
        async def consume() -> None:
            async for _ in p.generate(LONG):
                pass

        task = asyncio.create_task(consume())
        await health_when(p, lambda h: h["running"] == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await health_when(p, lambda h: h["running"] == 0 and h["kv_bytes"] == 0)

    asyncio.run(work(process))


def test_threads_can_change_while_it_runs(process: EngineProcess) -> None:
    async def work(p: EngineProcess) -> None:
        await p.set_threads(2)
        assert (await p.health())["threads"] == 2
        await p.set_threads(1)
        assert (await p.health())["threads"] == 1

    asyncio.run(work(process))


def test_no_secret_of_ours_reaches_the_process(process: EngineProcess, home: Home) -> None:
    """Its environment is a short list of names, and not even the engine's own token is in its log."""
    child = process.ensure_now()
    names = {e.split(b"=")[0].decode() for e in Path(f"/proc/{child.process.pid}/environ").read_bytes().split(b"\0")}
    assert not names & {"OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "PYTEST_CURRENT_TEST"}
    assert child.token not in process.log_file.read_text()


@pytest.mark.slow
def test_killed_it_starts_again(process: EngineProcess) -> None:
    """SIGKILL in the middle of an answer: that answer ends with a clear error, the next request is served."""

    async def work(p: EngineProcess) -> None:
        stream, first = p.generate(LONG), p.pid
        assert first is not None and (await anext(stream))["type"] == "start"
        os.kill(first, signal.SIGKILL)
        with pytest.raises(EngineFailed) as e:
            async for _ in stream:
                pass
        assert "Send the request again" in e.value.message
        events = [e async for e in p.generate({**LONG, "max_tokens": 3})]
        assert events[-1]["type"] == "done" and p.pid != first and p.state == "running"

    asyncio.run(work(process))


@pytest.mark.slow
def test_killed_while_idle_nobody_notices(process: EngineProcess) -> None:
    async def work(p: EngineProcess) -> None:
        first = p.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        events = [e async for e in p.generate({**LONG, "max_tokens": 3})]
        assert events[-1]["type"] == "done" and p.pid != first

    asyncio.run(work(process))


def test_a_crash_loop_ends_with_a_clear_error(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that dies at once is not started for ever."""
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'no such library' >&2\nexit 70\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    process = EngineProcess(Home(tmp_path / "home").ensure())
    for _ in range(DEATHS):
        with pytest.raises(EngineFailed) as e:
            process.ensure_now()
        assert "did not start" in e.value.message and "no such library" in e.value.message
    with pytest.raises(EngineFailed) as e:
        process.ensure_now()
    assert f"{DEATHS} times within a minute" in e.value.message and process.state == "failing"


@pytest.mark.slow
def test_it_ends_with_the_process_that_started_it(home: Home) -> None:
    """The parent is killed with SIGKILL, so nobody tells the engine; it must notice by itself."""
    script = (
        "import sys, time\nfrom tunewright.core.home import find_home\n"
        "from tunewright.engine.client import EngineProcess\n"
        "p = EngineProcess(find_home(sys.argv[1]), threads=1)\np.ensure_now()\n"
        "print(p.pid, flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(home.root)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_client_imports_no_torch() -> None:
    names = ("torch", "transformers", "fastapi", "peft")
    code = f"import sys, tunewright.engine.client; print([m for m in {names} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_without_a_token_it_does_not_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tunewright.engine.server", "--ready-file", str(tmp_path / "ready")]
    env = {k: v for k, v in os.environ.items() if k != "TUNEWRIGHT_ENGINE_TOKEN"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 1 and "needs a token" in done.stderr and "Traceback" not in done.stderr
