"""The dashboard as an ASGI app: routes, sign-in, the frame around every page, the guard around everything."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from nicegui import app as nicegui_app
from nicegui import ui

from tunewright.web import kit
from tunewright.web.client import Api, ApiDown, ApiError
from tunewright.web.desk import Desk, Session
from tunewright.web.guard import HostOriginGuard, allowed_hosts
from tunewright.web.pages import create, jobs, playground, recipes, signin

SESSION_SECONDS = 14 * 24 * 3600
NAVIGATION = (("Jobs", "/jobs"), ("Recipes", "/recipes"), ("Playground", "/playground"))
FILE_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")


def make_app(desk: Desk, *, host: str, port: int, secret: str, extra_hosts: Iterable[str] = ()) -> HostOriginGuard:
    """The whole dashboard, guard outermost. secret: signs the session cookies; keep it between starts."""
    outer = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=closing(desk.api))
    outer.add_api_route("/healthz", healthz, methods=["GET"])
    add_routes(desk)
    ui.run_with(
        outer,
        root=root_of(desk),
        title="tunewright",
        favicon=kit.STATIC / "logo.svg",
        dark=None,
        language="en-US",
        reconnect_timeout=30.0,
        tailwind=False,
        storage_secret=secret,
        session_middleware_kwargs={
            "session_cookie": f"tunewright_session_{port}",
            "same_site": "strict",
            "max_age": SESSION_SECONDS,
        },
        show_welcome_message=False,
    )
    return HostOriginGuard(outer, allowed_hosts(host, port, extra_hosts))


def closing(api: Api) -> Any:
    """A lifespan that closes the connection pool at the end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await api.close()

    return lifespan


async def healthz() -> JSONResponse:
    return JSONResponse({"status": "ok"})


def add_routes(desk: Desk) -> None:
    """What is not a page: the sign-in link, downloads, static files."""

    async def sign_in(token: str = "") -> Response:
        try:
            await desk.sign_in(token, nicegui_app.storage.user)
        except ApiDown:
            return RedirectResponse("/?problem=down", 303)
        except ApiError:
            return RedirectResponse("/?problem=link", 303)
        return RedirectResponse("/jobs", 303)

    async def download(request: Request, file_id: str) -> Response:
        session = session_of(desk)
        if session is None or not FILE_ID.fullmatch(file_id):
            return Response("Sign in first.", 401 if session is None else 404)
        return await send_file(session.api, file_id)

    nicegui_app.add_api_route("/signin", sign_in, methods=["GET"], include_in_schema=False)
    nicegui_app.add_api_route("/files/{file_id}/download", download, methods=["GET"], include_in_schema=False)
    kit.serve_static()


async def send_file(api: Api, file_id: str) -> Response:
    """A file of the API's, passed on piece by piece as an attachment."""
    try:
        name = (await api.file(file_id))["filename"]
    except ApiError as e:
        return Response(e.message, e.status or 502, media_type="text/plain")

    async def body() -> AsyncIterator[bytes]:
        async with api.stream("GET", f"/v1/files/{file_id}/content") as answer:
            async for chunk in answer.aiter_bytes():
                yield chunk

    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    headers = {"content-disposition": f'attachment; filename="{safe}"', "cache-control": "no-store"}
    return StreamingResponse(body(), headers=headers, media_type="application/octet-stream")


def session_of(desk: Desk) -> Session | None:
    """The session of the browser that is being answered."""
    return desk.session(nicegui_app.storage.browser["id"], nicegui_app.storage.user)


def root_of(desk: Desk) -> Any:
    """The function that builds every page."""

    def root(problem: str = "") -> None:
        kit.page_style()
        session = session_of(desk)
        if session is None:
            signin.build(desk, nicegui_app.storage.user, problem)
            return
        build_header(session)
        build_banner(desk)
        with kit.box("tw-main"):
            kit.Pages(
                {
                    "/": lambda: home(session),
                    "/jobs": lambda: jobs.build(session),
                    "/jobs/new": lambda: create.build(session),
                    "/recipes": lambda: recipes.build(session),
                    "/playground": lambda model="", base="": playground.build(session, model, base),
                }
            )

    return root


def home(session: Session) -> None:
    """The first page. NiceGUI also comes here with addresses that no page has; its router then says so."""
    if kit.current_path() in ("", "/"):
        jobs.build(session)


def build_header(session: Session) -> None:
    with kit.box("tw-header", "header"):
        with kit.link("", "/jobs", "tw-brand") as brand:
            brand.props["aria-label"] = "tunewright: your jobs"
            kit.box("tw-logo")
            kit.Text("tunewright", "tw-wordmark")
        with kit.box("tw-nav", "nav") as nav:
            nav.props["aria-label"] = "Pages"
            links = {path: kit.link(text, path, "tw-nav-link") for text, path in NAVIGATION}
        kit.box("tw-spring")
        if not session.desk.public:
            kit.button("Sign out", lambda: sign_out(session), kind="quiet", name="sign-out")
        kit.button("New job", lambda: kit.go("/jobs/new"), icon="add", kind="primary", name="new-job")

    def mark_current(path: str) -> None:
        for target, element in links.items():
            here = path.startswith(target) or (target == "/jobs" and path == "/")
            element.props["aria-current"] = "page" if here else None
            element.update()

    mark_current(kit.current_path())
    kit.on_path(mark_current)


def sign_out(session: Session) -> None:
    session.sign_out()
    kit.reopen("/")


def build_banner(desk: Desk) -> None:
    """A line across the page while the API does not answer; it goes by itself."""
    health = desk.health()
    with kit.tag(kit.box("tw-banner"), "api-down") as banner:
        banner.props["role"] = "status"
        kit.Text(f"The API at {desk.api.base_url} does not answer. Your work is safe; trying again…")
    banner.set_visibility(False)

    def check() -> None:
        health.look()
        banner.set_visibility(isinstance(health.error, ApiDown))

    kit.every(1.0, check)
