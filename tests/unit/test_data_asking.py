"""Asking a teacher: in order, kept, within a budget, patient with a busy server, clear about a refusing one."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from teacher_kit import completion
from tunewright.core.asking import Teacher, read_answer
from tunewright.core.conversation import Conversation
from tunewright.core.errors import DataError, EndpointDown, Interrupted, UserError
from tunewright.core.outbound import Endpoint, Reply
from tunewright.data.asking import Asked, answered_rows
from tunewright.data.formats import FORMATS
from tunewright.data.formats.detect import decide

ENDPOINT = Endpoint("https", "teacher.example", 443, "/v1")


class Server:
    """post() of a teacher. say: status and value of the answer to a request; the number of the request comes first."""

    def __init__(self, say: Any = None) -> None:
        self.say = say or (lambda n, body: (200, completion(f"to {body['messages'][-1]['content']}")))
        self.bodies: list[Any] = []
        self.lock = threading.Lock()

    def __call__(self, endpoint: Endpoint, path: str, body: Any, timeout: float) -> Reply:
        assert (endpoint, path) == (ENDPOINT, "/chat/completions")
        with self.lock:
            self.bodies.append(body)
            n = len(self.bodies)
        return Reply(*self.say(n, body))


def rows(n: int) -> list[Conversation]:
    return [FORMATS.load("prompt").convert({"prompt": f"q{i}"}, i + 1) for i in range(n)]


def run(
    server: Server, cache: Path, given: list[Conversation], asked: Asked | None = None, **options: Any
) -> list[dict[str, Any]]:
    teacher = Teacher(ENDPOINT, "m", cache, back_off=(0.0, 0.0), post=server, **options.pop("teacher", {}))
    how = {"budget": 10**6, "concurrency": 3, "stop": lambda: False, **options}
    return list(answered_rows(given, teacher, asked or Asked(), **how))


def test_answers_come_in_order_and_are_kept(tmp_path: Path) -> None:
    def slow_first(n: int, body: Any) -> tuple[int, Any]:
        time.sleep(0.05 if body["messages"][-1]["content"] == "q0" else 0)
        return 200, completion(f"to {body['messages'][-1]['content']}")

    server, asked = Server(slow_first), Asked()
    options = {"teacher": {"system": "Be brief.", "options": {"temperature": 0.5}}}
    found = run(server, tmp_path, rows(7), asked, **options)
    want = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"to q{i}"}] for i in range(7)]
    assert [row["messages"] for row in found] == want
    assert server.bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (server.bodies[0]["model"], server.bodies[0]["temperature"]) == ("m", 0.5)
    assert (asked.rows, asked.answered, asked.kept, asked.tokens) == (7, 7, 0, 70)

    again, asked = Server(lambda n, body: (500, None)), Asked()
    assert run(again, tmp_path, rows(7), asked, **options) == found
    assert not again.bodies and (asked.kept, asked.tokens) == (7, 70)
    with pytest.raises(EndpointDown):  # another temperature is another question
        run(again, tmp_path, rows(1))


def test_a_chat_rows_last_answer_is_asked_again(tmp_path: Path) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = Conversation.model_validate({"messages": [{"role": r, "content": c} for r, c in turns], "source": 1})
    server = Server()
    (found,) = run(server, tmp_path, [row])
    assert [m["content"] for m in server.bodies[0]["messages"]] == ["a", "b", "c"]
    assert [(m["content"], m.get("weight")) for m in found["messages"]] == [
        ("a", None), ("b", 0), ("c", None), ("to c", None),
    ]  # fmt: skip


@pytest.mark.parametrize("concurrency", [1, 4])
def test_the_budget_ends_at_the_same_row_each_time(tmp_path: Path, concurrency: int) -> None:
    for _ in range(2):
        asked = Asked()
        found = run(Server(), tmp_path, rows(9), asked, budget=35, concurrency=concurrency)
        assert len(found) == 4 and (asked.answered, asked.left_out, asked.tokens) == (4, 5, 40)


def test_answers_that_teach_nothing_are_left_out(tmp_path: Path) -> None:
    said = [completion(""), completion(None), completion("half", reason="length"), {"choices": []}, [], None]
    asked = Asked()
    server = Server(lambda n, body: (200, said[int(body["messages"][-1]["content"][1:])]))
    assert run(server, tmp_path, rows(6), asked, concurrency=1) == []
    assert asked.unusable == 6 and "no text" in asked.reason
    assert read_answer(Reply(200, completion("half", reason="length"))).why == "an answer was cut off at max_tokens"


def test_a_busy_server_is_asked_again_and_a_refusing_one_is_not(tmp_path: Path) -> None:
    busy = Server(lambda n, body: (200, completion("yes")) if n == 3 else ((429, 503)[n - 1], None, 0.0))
    assert run(busy, tmp_path, rows(1))[0]["messages"][-1]["content"] == "yes" and len(busy.bodies) == 3
    down = Server(lambda n, body: (503, {"error": {"message": "overloaded"}}))
    with pytest.raises(EndpointDown, match=r"answered 503: overloaded \(tried 3 times\).*kept; resume"):
        run(down, tmp_path / "b", rows(1))
    refusing = Server(lambda n, body: (401, {"error": {"message": "Incorrect API key"}}))
    with pytest.raises(UserError, match=r"https://teacher\.example/v1 answered 401: Incorrect API key\. Check"):
        run(refusing, tmp_path / "c", rows(1))
    assert len(refusing.bodies) == 1


def test_what_was_answered_before_the_server_went_down_is_kept(tmp_path: Path) -> None:
    first = Server(lambda n, body: (200, completion("yes")) if n <= 4 else (500, None))
    with pytest.raises(EndpointDown):
        run(first, tmp_path, rows(9), concurrency=1)
    second, asked = Server(), Asked()
    assert len(run(second, tmp_path, rows(9), asked)) == 9
    assert asked.kept == 4 and len(second.bodies) == 5


def test_asking_ends_when_the_job_is_to_stop(tmp_path: Path) -> None:
    held = threading.Event()
    server = Server(lambda n, body: (held.wait(30), (200, completion("late")))[1])
    begun = time.monotonic()
    with pytest.raises(Interrupted):
        run(server, tmp_path, rows(3), stop=lambda: time.monotonic() - begun > 0.1)
    assert time.monotonic() - begun < 10  # it did not wait for the server
    held.set()


def test_rows_that_cannot_be_asked(tmp_path: Path) -> None:
    only = Conversation.model_validate({"messages": [{"role": "assistant", "content": "x"}], "source": 3})
    with pytest.raises(DataError, match="line 3: has no user message before its answer"):
        run(Server(), tmp_path, [only])


def test_prompts_are_recognised_by_having_nothing_else() -> None:
    def name(fields: list[str]) -> str | None:
        chosen = decide([fields] * 3).format
        return None if chosen is None else chosen.name

    assert name(["prompt"]) == "prompt" and name(["prompt", "completion"]) == "prompt_completion"
    assert name(["prompt", "answer"]) is None  # perhaps a completion: it is asked back, with the nearest format
    row = FORMATS.load("prompt").convert({"prompt": [{"role": "user", "content": "a"}]}, 1)
    assert row.shape == "prompt"
    with pytest.raises(DataError, match="ends with an assistant message"):
        FORMATS.load("prompt").convert({"prompt": [{"role": "assistant", "content": "a"}]}, 1)
