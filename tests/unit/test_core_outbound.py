"""Calls to other servers go where the operator said, and to no other place whatever names and servers try."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import pytest

from teacher_kit import teacher_server
from tunewright.core import outbound
from tunewright.core.errors import EndpointDown, Forbidden, SpecError
from tunewright.core.outbound import choose_address, find_endpoint, is_public, parse_url, post_json

LISTED = {outbound.VARIABLE: "https://api.example.com/v1/=KEY, http://127.0.0.1:11434/v1"}


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a", "file:///etc/passwd", "a.example", "https://", "http://a@b", "http://u:p@b", "http://ok.com\\@evil",
        "http://a b", "http://a\tb", "http://ex\u00e4mple", "https://a/?q=1", "https://a/#f", "http://a:99999", "http://a:x",
    ],
)  # fmt: skip
def test_what_is_no_base_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        parse_url(url)
    with pytest.raises(SpecError, match="cannot be called"):
        find_endpoint(url, LISTED)


def test_only_listed_endpoints_are_found() -> None:
    found = find_endpoint("HTTPS://API.example.com:443/v1", LISTED)
    assert (found.url, found.key_variable) == ("https://api.example.com/v1", "KEY")
    assert find_endpoint("http://127.0.0.1:11434/v1/", LISTED).port == 11434
    for url in ("http://api.example.com/v1", "https://api.example.com/v2", "http://127.0.0.1:11435/v1"):
        with pytest.raises(SpecError, match="not one that this machine may call") as e:
            find_endpoint(url, LISTED)
        assert e.value.code == "endpoint_not_allowed" and "Did you mean" in e.value.message
    with pytest.raises(SpecError, match="None is listed"):
        find_endpoint("https://api.example.com/v1", {})
    with pytest.raises(SpecError, match="lists 'nonsense'"):
        find_endpoint("https://api.example.com/v1", {outbound.VARIABLE: "nonsense"})


def test_a_process_gets_the_key_of_its_endpoint_only() -> None:
    environ = {**LISTED, "KEY": "sk-1", "OTHER": "sk-2"}
    given = outbound.environment(["https://api.example.com/v1"], environ)
    assert given == {outbound.VARIABLE: "https://api.example.com/v1=KEY", "KEY": "sk-1"}
    assert find_endpoint("https://api.example.com/v1", given).key_variable == "KEY"
    assert "KEY" not in outbound.environment(["http://127.0.0.1:11434/v1"], environ)
    both = outbound.environment(["http://127.0.0.1:11434/v1", "https://api.example.com/v1"], environ)
    assert both == {outbound.VARIABLE: "http://127.0.0.1:11434/v1,https://api.example.com/v1=KEY", "KEY": "sk-1"}
    assert outbound.environment([], environ) == {}


def test_endpoints_are_found_however_deep() -> None:
    judge = {"type": "score_model", "tunewright": {"endpoint": "http://b"}}
    options = {"endpoint": "http://a", "grader": {"graders": {"x": judge, "y": judge}}, "more": [{"endpoint": None}]}
    assert outbound.named_endpoints(options) == ["http://a", "http://b"]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("::ffff:8.8.8.8", True), ("64:ff9b::808:808", True),
        ("127.0.0.1", False), ("10.0.0.1", False), ("172.16.0.1", False), ("192.168.1.1", False), ("0.0.0.0", False),
        ("100.64.0.1", False), ("169.254.169.254", False), ("224.0.0.1", False), ("255.255.255.255", False),
        ("::1", False), ("::", False), ("fe80::1", False), ("fc00::1", False), ("::ffff:10.0.0.1", False),
        ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False), ("2001:0:a00:1::", False),
    ],
)  # fmt: skip
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


@pytest.mark.parametrize("host", ["127.1", "0x7f000001", "2130706433", "0"])
def test_other_spellings_of_this_machine_are_no_public_host(host: str) -> None:
    with pytest.raises(Forbidden, match="not public") as e:
        choose_address(parse_url(f"http://{host}/v1"))
    assert e.value.code == "endpoint_not_public"


def resolver(*addresses: str) -> Any:
    asked = []

    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

    getaddrinfo.asked = asked  # type: ignore[attr-defined]
    return getaddrinfo


def test_every_address_of_a_name_must_be_public(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = parse_url("https://api.example.com/v1")
    monkeypatch.setattr(socket, "getaddrinfo", resolver("8.8.8.8", "10.0.0.5"))
    with pytest.raises(Forbidden, match=r"leads to 10\.0\.0\.5"):
        choose_address(endpoint)
    monkeypatch.setattr(socket, "getaddrinfo", resolver("8.8.8.8"))
    assert choose_address(endpoint) == "8.8.8.8"
    assert choose_address(parse_url("http://[::1]:8000")) == "::1"  # listed by its address
    monkeypatch.setattr(socket, "getaddrinfo", resolver("8.8.8.8"))
    with pytest.raises(Forbidden):
        choose_address(parse_url("http://localhost:8000"))


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that resolves to another place a moment later gets nowhere: it is looked up once."""
    looked_up, called = resolver("8.8.8.8"), []

    def connect(address: tuple[str, int], timeout: float) -> Any:
        called.append(address)
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(EndpointDown, match=r"https://api\.example\.com/v1 does not answer: timed out"):
        post_json(parse_url("https://api.example.com/v1"), "/chat/completions", {}, 1.0)
    assert looked_up.asked == ["api.example.com"] and called == [("8.8.8.8", 443)]


def test_a_request_and_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with teacher_server(lambda body: (200, {"ok": body})) as server:
        endpoint = find_endpoint(server.url, {outbound.VARIABLE: f"{server.url}=THE_KEY"})
        environ = {"THE_KEY": "sk-secret"}
        reply = post_json(endpoint, "/chat/completions", {"a": "ä"}, 10.0, environ)
        assert (reply.status, reply.value) == (200, {"ok": {"a": "ä"}})
        path, headers, _ = server.seen[0]
        assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sk-secret"
        assert headers["Host"] == server.url.split("/")[2]

        server.answer = lambda body: (302, b"", {"Location": "http://127.0.0.1:1/"})
        assert post_json(endpoint, "", {}, 10.0, environ).status == 302 and len(server.seen) == 2
        server.answer = lambda body: (429, b"<html>", {"Retry-After": "7"})
        assert post_json(endpoint, "", {}, 10.0, environ) == outbound.Reply(429, None, 7.0)
        server.answer = lambda body: (401, {"error": {"message": "bad key sk-secret"}})
        assert "sk-secret" not in str(post_json(endpoint, "", {}, 10.0, environ).value)
        server.answer = lambda body: (200, b"0" * 100)
        monkeypatch.setattr(outbound, "MAX_BYTES", 99)
        with pytest.raises(EndpointDown, match="larger than 99 bytes"):
            post_json(endpoint, "", {}, 10.0, environ)
        server.answer = lambda body: (200, b"12345", {"Content-Length": "9"})
        with pytest.raises(EndpointDown, match="broke off"):
            post_json(endpoint, "", {}, 10.0, environ)
    with pytest.raises(EndpointDown, match="refused"):
        post_json(endpoint, "", {}, 10.0, environ)
