"""Signing in: the one-time link does it by itself; this page is for who arrives without one."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from tunewright.web import kit
from tunewright.web.desk import Desk

PROBLEMS = {
    "link": "This sign-in link has been used or has expired. Each start of `tunewright up` prints a new one.",
    "down": "The API did not answer, so the link could not be checked. It is still good: open it again in a moment.",
}


def build(desk: Desk, store: MutableMapping[str, Any], problem: str = "") -> None:
    with kit.box("tw-signin"), kit.card(name="signin"):
        with kit.box("tw-brand"):
            kit.box("tw-logo")
            kit.Text("tunewright", "tw-wordmark")
        kit.heading("Sign in", 1)
        if problem in PROBLEMS:
            kit.error_box(PROBLEMS[problem])
        kit.Text("Open the sign-in link that `tunewright up` printed when it started. It works once.", kind="p")
        kit.Text("Or use an API key:", kind="p")
        key = kit.text_input("API key", "", lambda _: None, name="api-key", placeholder="sk-…").props("type=password")

        async def sign_in() -> None:
            await desk.sign_in_with_key((key.value or "").strip(), store)
            kit.reopen("/jobs")

        key.on("keydown.enter", kit.guarded(sign_in))
        kit.button("Sign in", sign_in, kind="primary", name="signin-button")
