"""Calls to other servers (a teacher, a judge): only to those that the operator listed, and never tricked elsewhere.

TUNEWRIGHT_ENDPOINTS holds base URLs with commas between, each with the environment variable of its key if it needs one:
`https://api.openai.com/v1=OPENAI_API_KEY,http://127.0.0.1:11434/v1`. A host name is looked up once, every address must
be public, and the connection goes to one of these very addresses. A server in one's own network is listed by its
address (or as localhost). Redirects are not followed, proxies not used.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import re
import socket
import ssl
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tunewright.core.errors import EndpointDown, Forbidden, SpecError, did_you_mean

VARIABLE = "TUNEWRIGHT_ENDPOINTS"
MAX_BYTES = 10 << 20
PORTS = {"https": 443, "http": 80}
NAT64 = ipaddress.ip_network("64:ff9b::/96")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Endpoint:
    """A base URL that may be called. key_variable: the environment variable that holds its key, or ''."""

    scheme: str
    host: str
    port: int
    path: str
    key_variable: str = ""

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.path}"


@dataclass(frozen=True)
class Reply:
    """What a server answered. value: its JSON, None if it is none. retry_after: seconds it asks to wait, or None."""

    status: int
    value: Any
    retry_after: float | None = None


def parse_url(url: str) -> Endpoint:
    """Raises ValueError, which says why, for anything but a plain http or https base URL."""
    if not url.isascii() or re.search(r"[\s\\@?#]|%00", url) or not url.isprintable():
        raise ValueError("it may have no user name, query, fragment, backslash, space or letters beyond ASCII")
    parts = urlsplit(url)
    if parts.scheme not in PORTS or not parts.hostname:
        raise ValueError("it must begin with https:// or http:// and name a host")
    port = parts.port or PORTS[parts.scheme]  # raises ValueError for a port that is none
    return Endpoint(parts.scheme, parts.hostname.lower(), port, parts.path.rstrip("/"))


def endpoints(environ: Mapping[str, str] = os.environ) -> list[Endpoint]:
    """What the operator listed. Raises SpecError for an entry that is no base URL."""
    found = []
    for entry in filter(None, (e.strip() for e in environ.get(VARIABLE, "").split(","))):
        url, _, variable = entry.partition("=")
        try:
            known = parse_url(url.strip())
        except ValueError as e:
            raise SpecError(f"{VARIABLE} lists '{url[:200]}', which cannot be called: {e}.") from e
        found.append(Endpoint(known.scheme, known.host, known.port, known.path, variable.strip()))
    return found


def find_endpoint(url: str, environ: Mapping[str, str] = os.environ) -> Endpoint:
    """The listed endpoint of this URL. Raises SpecError for one that is not listed."""
    known = endpoints(environ)
    try:
        wanted = parse_url(url)
    except ValueError as e:
        raise SpecError(f"The endpoint '{url[:200]}' cannot be called: {e}.", param="endpoint") from e
    for endpoint in known:
        if endpoint.url == wanted.url:
            return endpoint
    names = [e.url for e in known]
    listed = f"Listed are: {', '.join(names)}.{did_you_mean(wanted.url, names)}" if names else "None is listed."
    raise SpecError(
        f"The endpoint {wanted.url} is not one that this machine may call. {listed} Whoever runs the server adds it to "
        f"the environment variable {VARIABLE}.",
        param="endpoint",
        code="endpoint_not_allowed",
    )


def named_endpoints(options: Any) -> list[str]:
    """Every URL under a key `endpoint` in a part's options, however deep: of a teacher, of a judge in a grader."""
    inner = options.values() if isinstance(options, dict) else options if isinstance(options, list) else ()
    own = options.get("endpoint") if isinstance(options, dict) else None
    found = [url for value in inner for url in named_endpoints(value)]
    return list(dict.fromkeys([*([own] if isinstance(own, str) and own else []), *found]))


def environment(urls: Iterable[str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that a process needs to call these endpoints, and no other's key. Raises like find_endpoint."""
    found = [find_endpoint(url, environ) for url in urls]
    entries = [e.url + (f"={e.key_variable}" if e.key_variable else "") for e in found]
    keys = {e.key_variable: environ.get(e.key_variable, "") for e in found if e.key_variable}
    return {VARIABLE: ",".join(entries), **keys} if found else {}


def post_json(
    endpoint: Endpoint, path: str, body: Any, timeout: float, environ: Mapping[str, str] = os.environ
) -> Reply:
    """POST `body` to the endpoint's path. timeout: seconds until the answer begins, and again until it is whole.

    Raises EndpointDown when no whole answer comes, Forbidden when the host's name leads into a network of its own.
    """
    secret = environ.get(endpoint.key_variable, "") if endpoint.key_variable else ""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {secret}"} if secret else {})}
    connection = _Pinned(endpoint, choose_address(endpoint), timeout)
    try:
        connection.request("POST", f"{endpoint.path}{path}", json.dumps(body).encode(), headers)
        answer = connection.getresponse()
        data = _whole(answer, timeout)
    except (OSError, http.client.HTTPException) as e:
        raise EndpointDown(f"{endpoint.url} does not answer: {_reason(e)}.") from e
    finally:
        connection.close()
    if secret:
        data = data.replace(secret.encode(), b"...")  # some servers repeat it in their errors
    return Reply(answer.status, _json(data), _seconds(answer.getheader("Retry-After")))


def choose_address(endpoint: Endpoint) -> str:
    """The address to connect to. Raises EndpointDown if the name has none, Forbidden unless all may be called."""
    try:
        return str(ipaddress.ip_address(endpoint.host))  # listed by its address: meant so
    except ValueError:
        pass
    try:
        infos = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    except OSError as e:
        raise EndpointDown(f"{endpoint.url} does not answer: {_reason(e)}.") from e
    found = [ipaddress.ip_address(str(info[4][0]).partition("%")[0]) for info in infos]
    allowed = (lambda a: a.is_loopback) if endpoint.host == "localhost" else is_public
    bad = [a for a in found if not allowed(a)]
    if bad or not found:
        raise Forbidden(
            f"{endpoint.url} is not called: its name leads to {bad[0] if bad else 'nothing'}, an address that is not "
            f"public. If you mean a server in your own network, list it by its address in {VARIABLE}.",
            code="endpoint_not_public",
        )
    return str(found[0])


def is_public(address: Address) -> bool:
    """Whether an address belongs to the internet at large, also where it is wrapped in another one."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in NAT64:
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if any(a is not None and not is_public(a) for a in inner):
            return False
        if address.ipv4_mapped is not None:
            return True
    return address.is_global and not address.is_multicast


class _Pinned(http.client.HTTPConnection):
    """A connection to one address, under the name of the endpoint's host."""

    def __init__(self, endpoint: Endpoint, address: str, timeout: float) -> None:
        super().__init__(endpoint.host, endpoint.port, timeout=timeout)
        self._address = address
        self._context = ssl.create_default_context() if endpoint.scheme == "https" else None
        self._default = endpoint.port == PORTS[endpoint.scheme]
        if self._default:
            self.default_port = endpoint.port  # the Host header leaves it out

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        peer = ipaddress.ip_address(str(self.sock.getpeername()[0]).partition("%")[0])
        if peer != ipaddress.ip_address(self._address):
            raise OSError("connected to another address")
        if self._context is not None:
            self.sock = self._context.wrap_socket(self.sock, server_hostname=self.host)


def _whole(answer: http.client.HTTPResponse, timeout: float) -> bytes:
    """The body. Raises OSError if it is too large, too slow or breaks off."""
    data, end = bytearray(), time.monotonic() + timeout
    while part := answer.read1(1 << 16):
        data += part
        if len(data) > MAX_BYTES or time.monotonic() > end:
            raise OSError(f"its answer is larger than {MAX_BYTES} bytes or takes more than {timeout:g} s")
    if answer.length:
        raise OSError("its answer broke off")
    return bytes(data)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _seconds(text: str | None) -> float | None:
    return float(text) if text and re.fullmatch(r"\d{1,6}", text.strip()) else None


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return str(text).strip().rstrip(".")[:200] or type(error).__name__
