"""What the dashboard process holds: its settings, who is signed in, and the live values that pages share."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from tunewright.web.chat import Chat, Settings, restore
from tunewright.web.client import Api, ApiError
from tunewright.web.feeds import Feed, JobView, health_feed, job_feed, jobs_feed

MAX_FEEDS = 200
MAX_CHATS = 200
SIDES = ("left", "right")


@dataclass
class Session:
    """One signed-in browser. store: its durable part; it holds the API key, the drafts and the chats."""

    id: str
    store: MutableMapping[str, Any]
    api: Api
    desk: Desk

    def job(self, job_id: str) -> Feed[JobView]:
        return self.desk.feed((self.api.key, "job", job_id), lambda: job_feed(self.api, job_id))

    def jobs(self) -> Feed[list[dict[str, Any]] | None]:
        return self.desk.feed((self.api.key, "jobs"), lambda: jobs_feed(self.api))

    def chats(self) -> dict[str, Chat]:
        """The two columns of the playground; they live on in this process when a page is reloaded."""
        return self.desk.chats(self.id, self.store.get("playground") or {})

    def save_chats(self) -> None:
        self.store["playground"] = {side: chat.saved() for side, chat in self.chats().items()}

    def sign_out(self) -> None:
        self.store.pop("api_key", None)


@dataclass
class Desk:
    """One dashboard process. public: the API asks for no key (`--open`), so neither does the dashboard."""

    api: Api
    public: bool = False
    _feeds: dict[tuple[Any, ...], Feed[Any]] = field(default_factory=dict)
    _chats: dict[str, dict[str, Chat]] = field(default_factory=dict)

    def session(self, id: str, store: MutableMapping[str, Any]) -> Session | None:
        """The session of a browser, None if it has to sign in."""
        key = store.get("api_key")
        if self.public or key:
            return Session(id, store, self.api.with_key(None if self.public else key), self)
        return None

    async def sign_in(self, token: str, store: MutableMapping[str, Any]) -> None:
        """Trade a one-time token for a key and keep it. Raises ApiError."""
        store["api_key"] = await self.api.sign_in(token)

    async def sign_in_with_key(self, key: str, store: MutableMapping[str, Any]) -> None:
        """Keep an API key after the API has accepted it once. Raises ApiError."""
        if not key.isascii() or not key.isprintable() or not key:
            raise ApiError("An API key is one line of plain characters.", status=400)
        await self.api.with_key(key).models()
        store["api_key"] = key

    def health(self) -> Feed[bool]:
        return self.feed(("health",), lambda: health_feed(self.api))

    def feed(self, key: tuple[Any, ...], make: Callable[[], Feed[Any]]) -> Feed[Any]:
        if key not in self._feeds:
            if len(self._feeds) >= MAX_FEEDS:
                self._feeds = {k: f for k, f in self._feeds.items() if not f.idle}
            self._feeds[key] = make()
        return self._feeds[key]

    def chats(self, id: str, saved: dict[str, Any]) -> dict[str, Chat]:
        if id not in self._chats:
            if len(self._chats) >= MAX_CHATS:
                # what is forgotten here is still in its session
                self._chats = {k: c for k, c in self._chats.items() if any(one.running for one in c.values())}
            self._chats[id] = {side: restore(saved.get(side), Settings()) for side in SIDES}
        return self._chats[id]
