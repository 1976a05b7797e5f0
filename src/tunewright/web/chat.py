"""One column of the playground: a conversation that goes on in the server while pages come and go."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from tunewright.web.client import Api, ApiError


@dataclass
class Settings:
    """What a column is asked with. temperature 0 to 2; max_tokens at least 1."""

    model: str = ""
    system: str = ""
    temperature: float = 0.0
    max_tokens: int = 256


@dataclass
class Chat:
    """A conversation and its settings. `version` grows with every visible change."""

    settings: Settings = field(default_factory=Settings)
    messages: list[dict[str, str]] = field(default_factory=list)
    note: str = ""
    error: str = ""
    version: int = 0
    _task: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def running(self) -> bool:
        return self._task is not None and not self._task.done()

    def saved(self) -> dict[str, Any]:
        """Plain data from which `restore` makes the same chat."""
        return {"settings": asdict(self.settings), "messages": list(self.messages), "note": self.note}

    def ask(self, api: Api, text: str) -> None:
        """Add the user's message and start streaming the answer; `stop` ends it early."""
        if self.running or not text.strip():
            return
        self.messages.append({"role": "user", "content": text})
        body = request_body(self.settings, self.messages)
        self.messages.append({"role": "assistant", "content": ""})
        self.error = self.note = ""
        self.version += 1
        self._task = asyncio.create_task(self._stream(api, body), name="chat")

    def stop(self) -> None:
        if self._task is not None and self.running:
            self._task.cancel()

    def clear(self) -> None:
        self.stop()
        self.messages, self.note, self.error = [], "", ""
        self.version += 1

    async def _stream(self, api: Api, body: dict[str, Any]) -> None:
        answer = self.messages[-1]
        try:
            async for piece in api.chat(body):
                answer["content"] += piece.text
                if piece.finish_reason == "length":
                    self.note = f"cut at {body['max_tokens']} tokens"
                if piece.usage:
                    tokens = f"{piece.usage['prompt_tokens']} tokens in · {piece.usage['completion_tokens']} out"
                    self.note = " · ".join(x for x in (tokens, self.note) if x)
                self.version += 1
        except asyncio.CancelledError:
            self.note = "stopped"
        except ApiError as e:
            self.error = e.message
        if not answer["content"] and answer in self.messages:
            self.messages.remove(answer)
        self.version += 1


def restore(saved: dict[str, Any] | None, default: Settings) -> Chat:
    """The chat that `Chat.saved` described; an empty one with `default` settings if there is none."""
    if not saved:
        return Chat(default)
    return Chat(Settings(**saved["settings"]), list(saved["messages"]), saved.get("note", ""))


def request_body(settings: Settings, messages: list[dict[str, str]]) -> dict[str, Any]:
    """The chat completion request of a column."""
    system = [{"role": "system", "content": settings.system}] if settings.system.strip() else []
    return {
        "model": settings.model,
        "messages": [*system, *({"role": m["role"], "content": m["content"]} for m in messages)],
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens,
    }


def as_python(base_url: str, settings: Settings, messages: list[dict[str, str]], keyed: bool) -> str:
    """A script with the `openai` package that asks the same. keyed: whether the server wants a key."""
    last_user = next((i for i in range(len(messages), 0, -1) if messages[i - 1]["role"] == "user"), 0)
    asked = messages[:last_user] or [{"role": "user", "content": "Hello"}]
    body = request_body(settings, asked)
    lines = ["[", *(f"        {json.dumps(m, ensure_ascii=False)}," for m in body["messages"]), "    ]"]
    key = 'os.environ["TUNEWRIGHT_API_KEY"]' if keyed else '"none"'
    return (
        ("import os\n\n" if keyed else "")
        + "from openai import OpenAI\n\n"
        + f"client = OpenAI(base_url={json.dumps(base_url + '/v1')}, api_key={key})\n"
        + "answer = client.chat.completions.create(\n"
        + f"    model={json.dumps(body['model'])},\n"
        + "    messages="
        + "\n".join(lines)
        + f",\n    temperature={body['temperature']},\n    max_tokens={body['max_tokens']},\n)\n"
        + "print(answer.choices[0].message.content)\n"
    )
