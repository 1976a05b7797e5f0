"""Every answer that is not a success has OpenAI's shape, a request id, and nothing of the server's inside."""

from __future__ import annotations

import hashlib

import httpx
import pytest
from live import LiveServer

from tunewright.api.body import MAX_JSON_BYTES

HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def error_of(response: httpx.Response) -> dict:
    """The error object, after checking what all of them have in common."""
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    assert error["message"] and "Traceback" not in error["message"] and "/home/" not in error["message"]
    assert response.headers["x-request-id"].startswith("req_")
    for name, value in HEADERS.items():
        assert response.headers[name] == value
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "server" not in response.headers
    return error


def test_unknown_url(http: httpx.Client) -> None:
    response = http.get("/v1/fine-tuning/jobs")
    assert response.status_code == 404
    error = error_of(response)
    assert error["code"] == "unknown_url" and "/v1/fine-tuning/jobs" in error["message"]


def test_wrong_method(http: httpx.Client) -> None:
    response = http.put("/v1/files")
    assert response.status_code == 405
    assert error_of(response)["code"] == "method_not_supported"


def test_body_that_is_not_json(http: httpx.Client) -> None:
    for body in (b"{", b"[1]", b"NaN", b"[" * 100_000, b"\xff\xfe"):
        response = http.post("/v1/chat/completions", content=body)
        assert response.status_code == 400, body[:10]
        assert error_of(response)["type"] == "invalid_request_error"


def test_body_that_is_too_large(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", content=b" " * (MAX_JSON_BYTES + 1))
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"


def test_all_that_is_wrong_is_said_at_once(http: httpx.Client) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": 3}], "temprature": 1, "top_p": 2}
    error = error_of(http.post("/v1/chat/completions", json=body))
    for word in ("messages[0].content", "temprature", "'temperature'", "top_p", "<= 1"):
        assert word in error["message"], error


def test_wrong_query_values(http: httpx.Client) -> None:
    for query, param in (("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order")):
        response = http.get(f"/v1/files?{query}")
        assert response.status_code == 400
        assert error_of(response)["param"] == param


@pytest.mark.parametrize("path", ["/v1/models", "/v1/files", "/v1/fine_tuning/jobs", "/healthz"])
def test_a_final_slash_changes_nothing(http: httpx.Client, path: str) -> None:
    plain, slashed = http.get(path), http.get(path + "/")
    assert plain.status_code == slashed.status_code == 200
    assert slashed.history == []


def test_model_names_with_slashes(http: httpx.Client) -> None:
    for name in ("org/none", "org%2Fnone"):
        response = http.get(f"/v1/models/{name}")
        assert response.status_code == 404
        assert error_of(response)["message"] == "The model 'org/none' does not exist"


def test_a_client_cannot_name_a_path(http: httpx.Client, tmp_path) -> None:
    for name in ("/etc", "../../etc", str(tmp_path), "./x.gguf"):
        for path, body in (
            ("/v1/chat/completions", {"model": name, "messages": [{"role": "user", "content": "x"}]}),
            ("/v1/fine_tuning/jobs", {"model": name, "training_file": "file-x"}),
        ):
            response = http.post(path, json=body)
            assert response.status_code in (400, 404)
            assert error_of(response)["param"] == "model"


def test_interactive_docs_are_off(http: httpx.Client) -> None:
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert http.get(path).status_code == 404


def test_an_unforeseen_error_tells_nothing_but_its_id(http: httpx.Client, server: LiveServer) -> None:
    data = {"file": ("a.txt", b"only in this test: its bytes vanish from the disk")}
    made = http.post("/v1/files", files=data, data={"purpose": "vision"}).json()
    digest = hashlib.sha256(data["file"][1]).hexdigest()
    (server.home / "files" / digest[:2] / digest).unlink()
    response = http.get(f"/v1/files/{made['id']}/content")
    assert response.status_code == 500
    error = error_of(response)
    assert error["type"] == "server_error" and response.headers["x-request-id"] in error["message"]
    assert response.headers["x-request-id"] in server.log.read_text()
    assert digest not in response.text and str(server.home) not in response.text
    assert http.delete(f"/v1/files/{made['id']}").json()["deleted"] is True
