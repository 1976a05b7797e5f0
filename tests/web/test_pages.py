"""The pages against the real API: first the dashboard process from outside, then its pages through NiceGUI's user."""

from __future__ import annotations

import asyncio
import json
import re
import stat
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from nicegui import ui
from nicegui.elements.upload_files import SmallFileUpload
from nicegui.storage import Storage
from nicegui.testing import User
from nicegui.testing.user_simulation import user_simulation
from stack import Program, api_program, web_program

import tiny
from tunewright.web import kit
from tunewright.web.client import Api
from tunewright.web.desk import Desk
from tunewright.web.shell import root_of

CHECK_SECONDS = 60.0


@pytest.fixture(scope="module", autouse=True)
def sessions_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Pages built in this process keep their sessions outside of the checkout."""
    before, Storage.path = Storage.path, tmp_path_factory.mktemp("sessions")
    yield
    Storage.path = before


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[Program]:
    """A server that asks for a key; its one-time sign-in token is in home/token."""
    home = tmp_path_factory.mktemp("web") / "home"
    tiny.install_tiny_model(home, "tiny", built=tiny_model_dir)
    with api_program(home, "--signin-token-file", str(home / "token")) as running:
        yield running


@pytest.fixture(scope="module")
def web(api: Program, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with web_program(tmp_path_factory.mktemp("state"), api.url) as running:
        yield running


@pytest.fixture(scope="module")
def signed_in(api: Program, web: Program) -> Iterator[httpx.Client]:
    """A browser that opened the one-time link."""
    token = (api.log.parent / "token").read_text()
    with httpx.Client(base_url=web.url) as client:
        answer = client.get("/signin", params={"token": token})
        assert (answer.status_code, answer.headers["location"]) == (303, "/jobs")
        yield client


@pytest.fixture(scope="module")
def key(web: Program, signed_in: httpx.Client) -> str:
    """The API key that the dashboard holds for the signed-in browser."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        for path in session_files(web):
            found = re.search(r'"api_key":\s*"([^"]+)"', path.read_text())
            if found:
                return found[1]
        time.sleep(0.05)
    raise AssertionError("no session holds a key")


def session_files(web: Program) -> list[Path]:
    return list((web.log.parent / "web" / "sessions").glob("storage-user-*.json"))


# --- the process, from outside ---------------------------------------------------------------------------------------


def test_the_link_works_once_and_the_key_stays_on_the_server(
    api: Program, web: Program, signed_in: httpx.Client, key: str
) -> None:
    page = signed_in.get("/jobs")
    assert page.status_code == 200 and "New job" in page.text and "api-key" not in page.text
    assert key not in page.text and key not in str(signed_in.cookies)
    token = (api.log.parent / "token").read_text()
    with httpx.Client(base_url=web.url, follow_redirects=True) as other:
        again = other.get("/signin", params={"token": token})
        assert "has been used or has expired" in again.text and "New job" not in again.text
        assert "New job" not in other.get("/jobs").text
        assert other.get("/files/file-1/download").status_code == 401


def test_sessions_are_files_that_only_the_user_can_read(web: Program, key: str) -> None:
    state = web.log.parent / "web"
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    for path in [state / "secret", *session_files(web)]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_cookie_and_headers(web: Program) -> None:
    answer = httpx.get(f"{web.url}/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert answer.headers["x-frame-options"] == "DENY" and answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy and "*" not in policy
    assert '<html lang="en-US"' in answer.text
    elsewhere = [u for u in re.findall(r"""(?:src|href)=["'](https?:)?//[^"']+""", answer.text) if u]
    assert elsewhere == []


def upgrade(web: Program, **headers: str) -> int:
    """The status of a WebSocket handshake."""
    base = {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    address = f"{web.url}/_nicegui_ws/socket.io/?EIO=4&transport=websocket&client_id=x"
    with httpx.stream("GET", address, headers={**base, **headers}) as answer:
        return answer.status_code


def test_websockets_from_other_sites_are_refused(web: Program) -> None:
    assert upgrade(web, origin=web.url) == 101
    assert upgrade(web, origin="https://evil.example") == 403
    assert upgrade(web, host="evil.example", origin=web.url) == 403


def test_a_second_dashboard_on_the_same_port_says_so(web: Program) -> None:
    command = [sys.executable, "-m", "tunewright.web", "--port", str(web.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 69 and "Choose another --port" in done.stderr and "Traceback" not in done.stderr


# --- the pages, through NiceGUI's simulated user ---------------------------------------------------------------------


def visit(api: Program, key: str, steps: Callable[[User], Awaitable[None]], url: str | None = None) -> None:
    """Run `steps` in a browser-less session that is signed in with `key`."""

    async def run() -> None:
        desk = Desk(Api(url or api.url))
        desk.api.key = key
        desk.public = True
        desk.api.with_key = lambda _: desk.api  # type: ignore[method-assign]
        async with user_simulation(root=root_of(desk)) as user:
            await steps(user)
        await desk.api.close()

    asyncio.run(run())


async def sees(user: User, *words: str, seconds: float = 20.0) -> None:
    for word in words:
        await user.should_see(word, retries=int(seconds * 10))


async def upload(user: User, role: str, name: str, data: bytes) -> None:
    await sees(user, f"upload-{role}")
    (place,) = user.find(f"upload-{role}").elements
    assert isinstance(place, ui.upload)
    await place.handle_uploads([SmallFileUpload(name, "application/octet-stream", data)])


def rows(n: int) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in tiny.sft_rows(n)).encode()


def test_without_jobs_the_page_says_how_to_begin(api: Program, key: str) -> None:
    async def steps(user: User) -> None:
        await user.open("/jobs")
        await sees(user, "no-jobs", "Train your first model", "No jobs yet.")

    visit(api, key, steps)


def test_an_unknown_page(signed_in: httpx.Client) -> None:
    answer = signed_in.get("/nowhere")
    assert answer.status_code == 404 and "There is nothing at this address" in answer.text


@pytest.mark.slow
def test_an_unknown_job(api: Program, key: str) -> None:
    async def steps(user: User) -> None:
        await user.open("/jobs/ftjob-none")
        await sees(user, "This job cannot be shown.")

    visit(api, key, steps)


@pytest.mark.slow
def test_an_api_that_is_down_is_said_and_waited_for(api: Program, key: str) -> None:
    async def steps(user: User) -> None:
        await user.open("/playground")
        await sees(user, "api-down", "Trying again")

    visit(api, key, steps, url="http://127.0.0.1:9")


def test_the_playground_offers_the_models(api: Program, key: str) -> None:
    async def steps(user: User) -> None:
        await user.open("/playground?base=tiny&model=%3Cb%3Ex")
        await sees(user, "model-left", "model-right", "question")
        (left,) = user.find("model-left").elements
        assert isinstance(left, ui.select) and "tiny" in left.options and left.value == "tiny"
        user.find("code-left").click()
        await sees(user, "code-dialog", "from openai import OpenAI")

    visit(api, key, steps)


@pytest.mark.slow
def test_bad_lines_are_shown_at_once_and_the_job_is_not_started(api: Program, key: str) -> None:
    bad = rows(12).replace(b'"assistant"', b'"assistent"', 1)

    async def steps(user: User) -> None:
        await user.open("/jobs/new")
        await sees(user, "upload-training_file", seconds=CHECK_SECONDS)
        await upload(user, "training_file", "<b>bad.jsonl", bad)
        await sees(user, "problems-training_file", "assistent", "<b>bad.jsonl")
        assert not any(isinstance(e, ui.html) for e in user.current_layout.descendants())
        user.find("create-job").click()
        await sees(user, "create-error", "cannot be used as it is")
        user.find("remove-training_file").click()
        await upload(user, "training_file", "broken.jsonl", b'{"messages": \n')
        await sees(user, "upload-error", "broken.jsonl was not accepted.")

    visit(api, key, steps)


@pytest.mark.slow
def test_a_job_with_too_few_rows_fails_readably(api: Program, key: str) -> None:
    async def steps(user: User) -> None:
        await user.open("/jobs/new")
        await sees(user, "upload-training_file", seconds=CHECK_SECONDS)
        await upload(user, "training_file", "three.jsonl", rows(3))
        await sees(user, "check-training_file", "3 example(s)")

    visit(api, key, steps)

    with httpx.Client(base_url=api.url, headers={"authorization": f"Bearer {key}"}) as client:
        found = client.get("/v1/files").json()["data"]
        file_id = next(f["id"] for f in found if f["filename"] == "three.jsonl")
        body = {"model": "tiny", "training_file": file_id, "suffix": "too-few"}
        job = client.post("/v1/fine_tuning/jobs", json=body, timeout=CHECK_SECONDS).json()

    async def look(user: User) -> None:
        await user.open(f"/jobs/{job['id']}")
        await sees(user, "job-error", "must have at least 10 examples", "too-few", seconds=CHECK_SECONDS)
        await sees(user, "Failed", "Validating training file")

    visit(api, key, look)


@pytest.mark.slow
def test_a_chain_shows_its_stages(api: Program, key: str) -> None:
    """One whose last stage's file is too short: nothing is trained, and every stage is on the page."""
    with httpx.Client(base_url=api.url, headers={"authorization": f"Bearer {key}"}, timeout=CHECK_SECONDS) as client:
        files = [
            client.post("/v1/files", files={"file": (f"{n}.jsonl", rows(n))}, data={"purpose": "fine-tune"}).json()[
                "id"
            ]
            for n in (12, 4)
        ]
        stages = [{"name": "first"}, {"name": "second", "training_file": files[1]}]
        body = {"model": "tiny", "training_file": files[0], "suffix": "two", "tunewright": {"stages": stages}}
        job = client.post("/v1/fine_tuning/jobs", json=body).json()

    async def look(user: User) -> None:
        await user.open(f"/jobs/{job['id']}")
        await sees(user, "stages", "first", "second", "Waiting", seconds=CHECK_SECONDS)
        await sees(user, "job-error", "Stage 'second': ", "must have at least 10 examples", seconds=CHECK_SECONDS)
        await user.should_not_see("resume-job")
        await user.should_not_see("stage-link")

    visit(api, key, look)


def test_the_draft_survives_a_reload(api: Program, key: str) -> None:
    async def steps(user: User) -> None:
        await user.open("/jobs/new")
        await sees(user, "suffix", seconds=CHECK_SECONDS)
        user.find("suffix").type("kept")
        user.find("n_epochs").type("7")
        await user.open("/jobs/new")
        await sees(user, "suffix")
        for name, value in (("suffix", "kept"), ("n_epochs", "7")):
            (element,) = user.find(name).elements
            assert isinstance(element, ui.input) and element.value == value

    visit(api, key, steps)


def selected(user: User, name: str) -> kit.Choices:
    (element,) = user.find(name).elements
    assert isinstance(element, kit.Choices)
    return element


@pytest.mark.slow
def test_every_tuner_can_be_chosen_and_what_clashes_is_closed(api: Program, key: str) -> None:
    described = httpx.get(f"{api.url}/v1/tunewright/describe", headers={"authorization": f"Bearer {key}"}, timeout=180)
    parts = described.json()["parts"]

    async def steps(user: User) -> None:
        await user.open("/jobs/new")
        await sees(user, "tuner", "quantization", "add-retain", "add-mix", seconds=CHECK_SECONDS)
        tuner, held = selected(user, "tuner"), selected(user, "quantization")
        assert list(tuner.options) == sorted(parts["tuner"])
        for name, row in parts["tuner"].items():
            tuner.set_value(name)
            await sees(user, f"usual learning rate {row['card']['default_lr']:g}")
            marks = [f"tuner-{option}" for option in row["schema"].get("properties", {})]
            assert all(len(user.find(mark).elements) == 1 for mark in marks), name
            assert ("nf4" in held.unfit) == (bool(parts["quantization"]["nf4"]["missing"]) or name in OF_THE_BASE)
        tuner.set_value("lora")
        held.set_value("nf4")
        assert set(tuner.unfit) == OF_THE_BASE and "freezes" in tuner.unfit["full"]
        closed = [o["label"] for o in tuner.props["options"] if o["disable"]]
        assert len(closed) == len(OF_THE_BASE) and all("trains the base itself" in label for label in closed)

    visit(api, key, steps)


OF_THE_BASE = {"full", "half", "child_f", "child_d", "fishmask", "last_layers"}


def test_a_result_file_comes_through_the_dashboard(
    api: Program, web: Program, signed_in: httpx.Client, key: str
) -> None:
    sent: dict[str, Any] = {"file": ('a "quoted".jsonl', rows(10)), "purpose": (None, "fine-tune")}
    headers = {"authorization": f"Bearer {key}"}
    file_id = httpx.post(f"{api.url}/v1/files", files=sent, headers=headers).json()["id"]
    answer = signed_in.get(f"/files/{file_id}/download")
    assert answer.content == rows(10)
    assert answer.headers["content-disposition"].startswith("attachment")
    assert signed_in.get("/files/file-none/download").status_code == 404
    assert signed_in.get("/files/..%2f..%2fmodels/download").status_code == 404
