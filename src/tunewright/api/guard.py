"""The outermost layers of the server: who may reach it from a browser, and what every response carries.

`HostOriginGuard` stops DNS rebinding and cross-site requests on every route, mount and WebSocket. `Envelope` gives each
request an id and each response its security headers, and lets every path be written with or without a final slash.
"""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

import psutil
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
WILDCARDS = ("0.0.0.0", "::", "")
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
MAX_HEADER_BYTES = 16 * 1024
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether binding to `host` is reachable from this machine only."""
    return host == "localhost" or host == "::1" or host.startswith("127.")


def allowed_hosts(host: str, port: int, extra: Iterable[str] = ()) -> frozenset[str]:
    """The values of the Host header that this server answers to.

    host, port: what it is bound to. extra: more names, with or without a port (a reverse proxy's public name).
    """
    names = [*LOOPBACK]
    if host in WILDCARDS:
        names += [socket.gethostname(), socket.getfqdn(), *_own_addresses()]
    elif host not in names:
        names.append(f"[{host}]" if ":" in host else host)
    found = {f"{name}:{port}" for name in names} | (set(names) if port == 80 else set())
    for name in extra:
        found |= {name} if _has_port(name) else {name, f"{name}:{port}"}
    return frozenset(name.lower() for name in found)


def _own_addresses() -> list[str]:
    found = [a for addresses in psutil.net_if_addrs().values() for a in addresses]
    plain = [a.address for a in found if a.family == socket.AF_INET]
    return plain + [f"[{a.address.partition('%')[0]}]" for a in found if a.family == socket.AF_INET6]


def _has_port(name: str) -> bool:
    return name.rpartition(":")[2].isdigit() and not name.endswith("]")


class HostOriginGuard:
    """Answers only to known Host names, and refuses state-changing requests that another site's page started."""

    def __init__(self, app: ASGIApp, allowed: frozenset[str]) -> None:
        self.app = app
        self.allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._problem(scope) if scope["type"] in ("http", "websocket") else None
        if problem is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _refuse(send, *problem)

    def _problem(self, scope: Scope) -> tuple[int, str] | None:
        """(HTTP status, message) if the request must be refused."""
        headers = [(k.decode("latin1").lower(), v.decode("latin1")) for k, v in scope["headers"]]
        if sum(len(k) + len(v) for k, v in headers) > MAX_HEADER_BYTES:
            return 431, f"The request's headers are larger than {MAX_HEADER_BYTES} bytes."
        hosts = [v.lower() for k, v in headers if k == "host"]
        if len(hosts) != 1:
            return 400, f"A request needs exactly one Host header; this one has {len(hosts)}."
        if hosts[0] not in self.allowed:
            return 403, (
                "This server does not answer to the host name of this request. Use the address that it printed at its "
                "start, or start it with --allow-host NAME."
            )
        if scope["type"] == "http" and scope["method"] in SAFE_METHODS:
            return None
        first = dict(reversed(headers))
        if first.get("sec-fetch-site") in ("cross-site", "same-site") or not self._same_origin(first.get("origin")):
            return 403, "This request was started by a page of another site and is refused."
        return None

    def _same_origin(self, origin: str | None) -> bool:
        return origin is None or urlsplit(origin).netloc.lower() in self.allowed


async def _refuse(send: Send, status: int, message: str) -> None:
    kind = "permission_error" if status == 403 else "invalid_request_error"
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Envelope:
    """Request id and security headers around everything; `/v1/files/` is `/v1/files`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # the id is set in place, so that the handler of unexpected errors, which is further out, sees it too
        scope["request_id"] = f"req_{secrets.token_hex(16)}"
        if scope["path"] != "/":
            scope["path"] = scope["path"].rstrip("/") or "/"

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *response_headers(scope)]
            await send(message)

        await self.app(scope, receive, send_with_headers)


def response_headers(scope: Scope) -> list[tuple[bytes, bytes]]:
    """The headers that every response carries, with the request's id."""
    named = {**SECURITY_HEADERS, "x-request-id": scope.get("request_id", ""), "openai-version": "2020-10-01"}
    return [(k.encode(), v.encode()) for k, v in named.items()]
