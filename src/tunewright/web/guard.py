"""The outermost layer of the dashboard: who may reach it, and the headers of every answer.

NiceGUI accepts WebSockets from any origin and pages under any host name, so this stands in front of all of it.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

import psutil

Scope = dict[str, Any]

PORT_AT_END = re.compile(r":\d+$")
WILDCARDS = ("0.0.0.0", "::", "")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# 'unsafe-eval' and 'unsafe-inline' are what Vue's in-browser compiler needs; so nothing of value lives in this origin's
# pages (the API key stays on the server side), and text of users and models is never rendered as HTML.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
SECURITY_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
BOUNCE = b'<!doctype html><html lang="en"><title>tunewright</title><meta http-equiv="refresh" content="0">'


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    return host in ("localhost", "::1") or host.startswith("127.")


def allowed_hosts(host: str, port: int, extra: Iterable[str] = ()) -> frozenset[str]:
    """The values of the Host header that are answered.

    host, port: what the dashboard is bound to. extra: public names; without a port, both with and without ours.
    """
    names = [*LOOPBACK]
    if host in WILDCARDS:
        names += [socket.gethostname(), socket.getfqdn(), *own_addresses()]
    elif not is_loopback(host):
        names.append(f"[{host}]" if ":" in host else host)
    found = {f"{name}:{port}" for name in names}
    for name in extra:
        found |= {name} if PORT_AT_END.search(name) else {name, f"{name}:{port}"}
    return frozenset(name.lower() for name in found)


def own_addresses() -> list[str]:
    """The addresses of this machine's network interfaces, as a Host header writes them."""
    found = [a for addresses in psutil.net_if_addrs().values() for a in addresses]
    plain = [a.address for a in found if a.family == socket.AF_INET]
    return plain + [f"[{a.address.partition('%')[0]}]" for a in found if a.family == socket.AF_INET6]


class HostOriginGuard:
    """ASGI middleware: exact Host names, same-origin writes and WebSockets only, security headers on everything."""

    def __init__(self, app: Any, allowed: frozenset[str]) -> None:
        self.app = app
        self.allowed = allowed

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = [(k.decode("latin1").lower(), v.decode("latin1")) for k, v in scope["headers"]]
        problem = self._problem(scope, headers)
        if problem is None and arrives_from_elsewhere(scope, dict(headers)):
            await answer(send, 200, BOUNCE, b"text/html; charset=utf-8")
        elif problem is None:
            await self.app(scope, receive, with_headers(send))
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            await answer(send, problem[0], problem[1].encode(), b"text/plain; charset=utf-8")

    def _problem(self, scope: Scope, headers: list[tuple[str, str]]) -> tuple[int, str] | None:
        """(HTTP status, message) if the request must be refused."""
        hosts = [v.lower() for k, v in headers if k == "host"]
        if len(hosts) != 1:
            return 400, f"A request needs exactly one Host header; this one has {len(hosts)}."
        if hosts[0] not in self.allowed:
            return 403, "The dashboard does not answer to this host name. Use the address that it printed at its start."
        if scope["type"] == "http" and scope["method"] in SAFE_METHODS:
            return None
        first = dict(reversed(headers))
        origin = first.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc.lower() not in self.allowed
        if foreign or first.get("sec-fetch-site") in ("cross-site", "same-site"):
            return 403, "This request was started by a page of another site and is refused."
        return None


def arrives_from_elsewhere(scope: Scope, headers: dict[str, str]) -> bool:
    """A link on another site was followed. The strict cookie is not sent with such a request, and answering it would
    replace the session; so the browser is told to load the same address once more, from here."""
    return (
        scope["type"] == "http"
        and headers.get("sec-fetch-site") in ("cross-site", "same-site")
        and headers.get("sec-fetch-mode") == "navigate"
        and "cookie" not in headers
    )


def with_headers(send: Any) -> Any:
    """`send` that adds the security headers to every HTTP answer."""

    async def send_with_headers(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *header_list()]
        await send(message)

    return send_with_headers


def header_list() -> list[tuple[bytes, bytes]]:
    return [(k.encode(), v.encode()) for k, v in SECURITY_HEADERS.items()]


async def answer(send: Any, status: int, body: bytes, kind: bytes) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *header_list()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
