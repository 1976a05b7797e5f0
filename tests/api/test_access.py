"""Who may call: keys on every route, one-time sign-in tokens, and no page of another site."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from live import SIGNIN_FILE, LiveServer

from tunewright.api.app import create_app
from tunewright.api.auth import PUBLIC
from tunewright.api.guard import allowed_hosts
from tunewright.core.errors import UserError
from tunewright.core.home import Home
from tunewright.jobs.store import Store


@pytest.fixture(scope="module")
def key(locked_server: LiveServer) -> str:
    """A session key, from the one-time token that the server wrote at its start."""
    place = locked_server.home / SIGNIN_FILE
    assert place.stat().st_mode & 0o077 == 0
    token = place.read_text()
    answer = httpx.post(f"{locked_server.url}/v1/tunewright/sessions", json={"token": token})
    assert answer.status_code == 200, answer.text
    again = httpx.post(f"{locked_server.url}/v1/tunewright/sessions", json={"token": token})
    assert again.status_code == 401 and again.json()["error"]["code"] == "invalid_signin_token"
    return answer.json()["key"]


@pytest.fixture
def locked(locked_server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=locked_server.url, timeout=300) as client:
        yield client


def every_route(home: Home) -> list[tuple[str, str]]:
    """(method, path) of everything the app answers to; fails on anything that is not a plain route."""
    store = Store.open(home)
    try:
        app = create_app(store, host="127.0.0.1", port=1, open_access=True)
    finally:
        store.close()
    return [(method, route.path) for route in plain_routes(app) for method in sorted(route.methods or ())]


def plain_routes(app: FastAPI) -> list[APIRoute]:
    found: list[APIRoute] = []

    def walk(routes: list[Any]) -> None:
        for route in routes:
            if isinstance(route, APIRoute):
                found.append(route)
            else:
                inner = getattr(route, "original_router", None) or getattr(route, "router", None)
                assert inner is not None, f"a mount, a WebSocket or an unknown kind of route: {route}"
                walk(inner.routes)

    walk(app.routes)
    return found


def test_no_route_answers_without_a_key(home: Home, locked: httpx.Client) -> None:
    routes = every_route(home)
    assert len(routes) >= 24 and set(routes) > set(PUBLIC)
    for method, path in routes:
        url = re.sub(r"\{[^}]+\}", "x", path)
        for headers in ({}, {"authorization": "Bearer sk-tw-wrong"}, {"authorization": "Basic eDp5"}):
            response = locked.request(method, url, headers=headers)
            if (method, path) in PUBLIC:
                assert response.status_code != 401 or response.json()["error"]["code"] == "invalid_signin_token"
            else:
                assert response.status_code == 401, (method, path)
                assert response.json()["error"]["code"] == "invalid_api_key"


def test_a_wrong_key_is_not_repeated(locked: httpx.Client) -> None:
    secret = "sk-proj-" + "s" * 40 + "tail"
    message = locked.get("/v1/models", headers={"authorization": f"Bearer {secret}"}).json()["error"]["message"]
    assert message.startswith("Incorrect API key provided: sk-") and "ssss" not in message


def test_a_session_key_works_and_makes_keys(locked: httpx.Client, key: str) -> None:
    me = locked.get("/v1/tunewright/whoami", headers={"authorization": f"Bearer {key}"}).json()
    assert me["open_access"] is False and me["organization_id"] == "org-personal"
    made = locked.post("/v1/tunewright/keys", json={"name": "ci"}, headers={"authorization": f"Bearer {key}"}).json()
    assert locked.get("/v1/models", headers={"authorization": f"bearer {made['key']}"}).status_code == 200


def test_a_body_is_not_read_before_the_key_was_checked(locked_server: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", locked_server.port)) as s:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{locked_server.port}\r\nContent-Length: 100\r\n\r\n"
        )
        s.sendall(head.encode())
        s.settimeout(120)
        assert s.recv(100).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", ""])
def test_open_is_refused_where_others_can_reach_it(home: Home, host: str) -> None:
    store = Store.open(home)
    try:
        with pytest.raises(UserError, match="--open"):
            create_app(store, host=host, port=8000, open_access=True)
    finally:
        store.close()


# --- the browser's side ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "localhost"},
        {"origin": "http://evil.example"},
        {"origin": "http://localhost:9999"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_other_sites_cannot_change_anything(http: httpx.Client, headers: dict[str, str]) -> None:
    response = http.post("/v1/fine_tuning/jobs", json={}, headers=headers)
    assert response.status_code == 403
    assert response.json()["error"]["type"] == "permission_error" and response.headers["x-request-id"]


def test_other_host_names_cannot_read(http: httpx.Client, server: LiveServer) -> None:
    assert http.get("/v1/models", headers={"host": f"evil.example:{server.port}"}).status_code == 403
    assert http.get("/v1/models", headers={"host": f"127.0.0.1:{server.port}/x"}).status_code == 403
    assert http.get("/v1/models", headers={"host": f"LOCALHOST:{server.port}"}).status_code == 200


def test_the_own_origin_is_welcome(http: httpx.Client, server: LiveServer) -> None:
    response = http.post(
        "/v1/chat/completions", json={}, headers={"origin": server.url, "sec-fetch-site": "same-origin"}
    )
    assert response.status_code == 400  # the request is wrong, not its origin


def raw(server: LiveServer, text: str) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.settimeout(120)
        s.sendall(text.replace("\n", "\r\n").encode())
        return s.recv(200)


def test_two_host_headers_or_none(server: LiveServer) -> None:
    own = f"127.0.0.1:{server.port}"
    assert b" 400 " in raw(server, f"GET /healthz HTTP/1.1\nHost: {own}\nHost: evil\n\n")
    assert b" 400 " in raw(server, "GET /healthz HTTP/1.0\n\n")


def test_very_long_headers(server: LiveServer) -> None:
    answer = raw(server, f"GET /healthz HTTP/1.1\nHost: 127.0.0.1:{server.port}\nX-A: {'a' * 20_000}\n\n")
    assert answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))


def test_a_websocket_is_refused(server: LiveServer) -> None:
    key = "dGhlIHNhbXBsZSBub25jZQ=="
    wanted = f"Connection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Version: 13\nSec-WebSocket-Key: {key}"
    answer = raw(server, f"GET /v1/models HTTP/1.1\nHost: evil\n{wanted}\n\n")
    assert answer.startswith(b"HTTP/1.1 403")


def test_no_cors(http: httpx.Client) -> None:
    response = http.get("/v1/models", headers={"origin": "http://evil.example"})
    assert not [h for h in response.headers if h.startswith("access-control-")]


def test_names_the_server_answers_to() -> None:
    assert allowed_hosts("127.0.0.1", 8000) == {"127.0.0.1:8000", "localhost:8000", "[::1]:8000"}
    assert {"localhost", "localhost:80"} <= allowed_hosts("127.0.0.1", 80)
    assert {"10.1.2.3:8000", "127.0.0.1:8000"} <= allowed_hosts("10.1.2.3", 8000)
    assert "[fe80::1]:8000" in allowed_hosts("fe80::1", 8000)
    behind_a_proxy = allowed_hosts("127.0.0.1", 8000, ["Tune.example", "a.example:8443"])
    assert {
        "tune.example",
        "tune.example:8000",
        "a.example:8443",
    } <= behind_a_proxy and "a.example" not in behind_a_proxy
    assert f"{socket.gethostname().lower()}:8000" in allowed_hosts("0.0.0.0", 8000)
