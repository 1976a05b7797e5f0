"""A teacher for tests: an OpenAI-compatible server on this machine, in a thread, that does as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Said = tuple[int, Any] | tuple[int, Any, dict[str, str]]


def completion(text: str | None, tokens: int = 10, reason: str = "stop") -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return {"object": "chat.completion", "choices": [choice], "usage": {"total_tokens": tokens}}


def echo(body: dict[str, Any]) -> Said:
    return 200, completion(f"You said: {body['messages'][-1]['content']}")


@dataclass
class TeacherServer:
    """url: the base URL. seen: (path, headers, body) of every request."""

    url: str
    answer: Callable[[dict[str, Any]], Said] = echo
    seen: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)


@contextmanager
def teacher_server(answer: Callable[[dict[str, Any]], Said] = echo) -> Iterator[TeacherServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told.seen.append((self.path, dict(self.headers), body))
            status, value, *more = told.answer(body)
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, text in (more[0] if more else {}).items():
                self.send_header(name, text)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    told = TeacherServer(f"http://127.0.0.1:{server.server_address[1]}/v1", answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield told
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
