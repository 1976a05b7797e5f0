"""Who may call: a bearer key on every route but the few listed here, unless the server is open on loopback."""

from __future__ import annotations

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from tunewright.api.guard import is_loopback
from tunewright.api.state import server_of
from tunewright.core.errors import AuthError, UserError

# (method, path) that need no key: readiness, and the exchange of a one-time token for a key
PUBLIC = frozenset({("GET", "/healthz"), ("POST", "/v1/tunewright/sessions")})


def check_exposure(host: str, open_access: bool) -> None:
    """Raise UserError if the server would be reachable by others without a key."""
    if open_access and not is_loopback(host):
        raise UserError(
            f"--open gives everyone who reaches the server full control, so it is refused on {host or '0.0.0.0'}. "
            "Leave --open out (clients then need a key), or bind 127.0.0.1.",
            code="open_access_refused",
        )


async def require_key(request: Request) -> None:
    """A dependency of the whole app. Raises AuthError (401)."""
    if (request.method, request.scope["path"]) in PUBLIC:
        return
    server = server_of(request)
    scheme, _, plain = request.headers.get("authorization", "").partition(" ")
    if server.open_access:
        return
    if scheme.lower() != "bearer" or not plain.strip():
        raise AuthError(
            "You didn't provide an API key. Send it as a bearer token: Authorization: Bearer YOUR_KEY. "
            "With the OpenAI SDK: OpenAI(base_url=…, api_key=…)."
        )
    key = await run_in_threadpool(server.store.check_key, plain.strip())
    if key is None:
        raise AuthError(f"Incorrect API key provided: {_masked(plain.strip())}. Keys of OpenAI do not work here.")
    request.state.key = key


def _masked(plain: str) -> str:
    """Enough to recognise one's own key, not enough to use it."""
    return f"{plain[:3]}…{plain[-4:]}" if len(plain) >= 20 else "…"
