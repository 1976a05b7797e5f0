"""A judge with a rule: an OpenAI-compatible server on this machine that prefers the answer which keeps the rule."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest.mock import patch

from tunewright.core.outbound import VARIABLE

Rule = Callable[[str], bool]


def choice(body: dict[str, Any], rule: Rule) -> str:
    """What the judge says to a question of data/judging.py: the number of the only answer that keeps the rule."""
    found = re.findall(r"<answer \d>\n(.*?)\n</answer \d>", body["messages"][-1]["content"], re.DOTALL)
    kept = [str(number) for number, text in enumerate(found, 1) if rule(text)]
    return kept[0] if len(kept) == 1 else "neither"


@contextmanager
def judging(rule: Rule) -> Iterator[str]:
    """The judge's base URL; within the block it answers, and jobs may call it."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            said = choice(json.loads(self.rfile.read(int(self.headers["Content-Length"]))), rule)
            message = {"role": "assistant", "content": said}
            answer = {"index": 0, "message": message, "finish_reason": "stop"}
            data = json.dumps({"object": "chat.completion", "choices": [answer], "usage": {"total_tokens": 1}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            """Nothing: thousands of questions."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with patch.dict(os.environ, {VARIABLE: url}):
            yield url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
