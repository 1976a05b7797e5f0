"""The dashboard's parts that need no page: thinning, forms, the guard, feeds, chats, the client."""

from __future__ import annotations

import ast
import asyncio
import io
import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewright.core.chain import parse_chain
from tunewright.core.spec import parse_spec
from tunewright.web import chat, forms, rules, series
from tunewright.web.client import Api, ApiDown, ApiError, delta_from, error_from, multipart_frame
from tunewright.web.desk import Desk
from tunewright.web.feeds import Feed
from tunewright.web.guard import HostOriginGuard, allowed_hosts
from tunewright.web.pages import job as job_page
from tunewright.web.pages import stages as stages_page

# --- charts ----------------------------------------------------------------------------------------------------------

POINTS = st.lists(st.floats(-1e6, 1e6), max_size=300).map(lambda ys: [(float(i), y) for i, y in enumerate(ys)])


@given(POINTS, st.integers(4, 50))
def test_thinning_keeps_ends_and_extremes(points: list[series.Point], limit: int) -> None:
    kept = series.thin(points, limit)
    assert len(kept) <= max(limit, 4)
    assert kept == sorted(kept) and set(kept) <= set(points)
    if points:
        assert (kept[0], kept[-1]) == (points[0], points[-1])
        for pick in (min, max):
            assert pick(y for _, y in kept) == pick(y for _, y in points)


@given(POINTS, POINTS)
def test_a_delta_appended_to_the_old_gives_the_new(old: list[series.Point], more: list[series.Point]) -> None:
    new = [*old, *((x + len(old), y) for x, y in more)]
    appended = series.delta(old, new)
    assert appended is not None and [*old, *appended] == new


def test_a_changed_past_cannot_be_appended() -> None:
    assert series.delta([(1, 2.0), (2, 1.0)], [(1, 2.0), (2, 1.5), (3, 1.0)]) is None
    assert series.delta([(1, 2.0), (2, 1.0)], [(1, 2.0)]) is None


def test_durations_and_sizes_read_well() -> None:
    assert [series.duration(s) for s in (None, 4.4, 200, 7500)] == ["–", "4 s", "3 min 20 s", "2 h 05 min"]
    assert [series.size(n) for n in (12, 1400, 2_500_000)] == ["12 B", "1.4 kB", "2.5 MB"]
    assert [series.ago(0, now) for now in (5, 300, 7200, 90_000)] == ["just now", "5 min ago", "2 h ago", "1 day ago"]


# --- forms -----------------------------------------------------------------------------------------------------------

SCHEMA = {
    "$defs": {"Bias": {"enum": ["none", "all"], "type": "string"}},
    "properties": {
        "r": {"type": "integer", "minimum": 1, "maximum": 512, "description": "Rank."},
        "alpha": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "bias": {"$ref": "#/$defs/Bias"},
        "targets": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
        "rslora": {"type": "boolean"},
    },
}
DEFAULTS = {"r": 16, "alpha": None, "bias": "none", "targets": "all-linear", "rslora": False}
LORA = {"schema": SCHEMA, "defaults": DEFAULTS, "card": {"works_on_nf4": True}}


def row(**card: Any) -> dict[str, Any]:
    return {"schema": {}, "defaults": {}, "card": card, "missing": None}


FILE_OPTION = {"file": {"type": "string"}, "share": {"type": "number", "minimum": 0, "maximum": 4}}
DESCRIBE: dict[str, Any] = {
    "tuner": {"lora": LORA, "full": row(works_on_nf4=False), "bitfit": row(works_on_nf4=True)},
    "quantization": {
        "auto": row(frozen=False),
        "nf4": row(frozen=True),
        "int8": {**row(frozen=True), "missing": "bnb"},
    },
    "retain": {
        "replay": {
            "schema": {"properties": FILE_OPTION},
            "defaults": {"file": "", "share": 0.25},
            "card": {"title": "Replay", "rows": "required"},
        },
        "l2sp": row(title="L2-SP", rows="none"),
    },
    "recipe": {
        "prompt": {**row(models=[], data=""), "schema": {"properties": {"system": {"type": "string"}}}},
        "proxy": row(models=["tuned", "small"], data=""),
        "mixture": row(models=["proposers"], data=""),
        "few_shot": row(models=[], data="rows"),
        "retrieval": row(models=[], data="documents"),
    },
    "objective": {
        "sft": {"schema": {}, "defaults": {}, "card": {"openai_method": "supervised"}},
        "own": {"schema": {}, "defaults": {}, "card": {"openai_method": None}},
    },
    "optimizer": {"adamw": row(), "adamw8bit": {**row(needs="bnb"), "missing": "bnb"}},
    "schedule": {"linear": {"schema": {}, "defaults": {}, "card": {}}},
}


def test_fields_follow_the_schema() -> None:
    found = {f.name: f for f in forms.fields(LORA)}
    kinds = {name: f.kind for name, f in found.items()}
    assert kinds == {"r": "int", "alpha": "float", "bias": "choice", "targets": "json", "rslora": "bool"}
    assert (found["r"].low, found["r"].high, found["r"].help) == (1, 512, "Rank.")
    assert found["alpha"].optional and found["bias"].choices == ("none", "all")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("r", "8", 8),
        ("alpha", "", None),
        ("alpha", "3.5", 3.5),
        ("targets", "all-linear", "all-linear"),
        ("targets", '["q_proj", "v_proj"]', ["q_proj", "v_proj"]),
    ],
)
def test_text_becomes_a_value(name: str, text: str, value: Any) -> None:
    field = next(f for f in forms.fields(LORA) if f.name == name)
    assert forms.parsed(field, text) == value
    assert forms.parsed(field, forms.shown(field, value)) == value


@pytest.mark.parametrize("text", ["", "0", "513", "eight", "1.5"])
def test_a_wrong_number_says_what_is_allowed(text: str) -> None:
    field = forms.fields(LORA)[0]
    with pytest.raises(ValueError, match=r"R (needs a value|is '?.*allowed: a whole number from 1 to 512)"):
        forms.parsed(field, text)


def draft(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "training_file": {"id": "file-1", "filename": "a.jsonl"}, **changes}


def test_a_draft_becomes_openais_request() -> None:
    options = {"tuner.lora": {"r": "8", "alpha": ""}}
    body, problems = forms.job_request(
        draft(n_epochs="3", batch_size="auto", seed="7", learning_rate="1e-3", options=options), DESCRIBE
    )
    assert problems == []
    hyper = {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": "auto"}
    assert body == {
        "model": "tiny",
        "training_file": "file-1",
        "seed": 7,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyper}},
        # alpha is at its default, so it is not sent
        "tunewright": {
            "objective": {"name": "sft"},
            "tuner": {"name": "lora", "r": 8},
            "optimizer": {"name": "adamw"},
            "schedule": {"name": "linear"},
            "learning_rate": 0.001,
        },
    }


def test_an_objective_of_our_own_has_no_openai_method() -> None:
    body, problems = forms.job_request(draft(objective="own"), DESCRIBE)
    assert problems == [] and "method" not in body
    assert body["hyperparameters"]["n_epochs"] == "auto" and body["tunewright"]["objective"] == {"name": "own"}


def test_all_problems_of_a_draft_come_at_once() -> None:
    _, problems = forms.job_request({"n_epochs": "99", "seed": "x", "options": {"tuner.lora": {"r": "0"}}}, DESCRIBE)
    text = "\n".join(problems)
    for words in ("training file", "base model", "Epochs is 99; allowed: auto, or", "Seed is 'x'", "R is 0"):
        assert words in text


CHAIN: dict[str, Any] = {
    **DESCRIBE,
    "objective": {
        **DESCRIBE["objective"],
        "grpo": {
            "schema": {"properties": {"grader": {"anyOf": [{"type": "object"}, {"type": "null"}]}}},
            "defaults": {"grader": None},
            "card": {"openai_method": "reinforcement", "needs_rollouts": True},
        },
    },
}
RATE: dict[str, Any] = {"type": "string_check", "name": "n"}


def test_stages_become_a_chain_and_its_job_file() -> None:
    """A stage is named by its objective; one that goes on from another says so by that name."""
    stages = [
        {"id": 4, "objective": "own", "tuner": "lora", "n_epochs": "2", "batch_size": "auto", "model": "stage:0"},
        {"id": 9, "objective": "own", "model": "stage:4"},
        {"id": 11, "objective": "sft", "model": ""},
    ]
    made = draft(
        n_epochs="3",
        suffix="s",
        stages=stages,
        options={"chain-4.tuner.lora": {"r": "8"}},
        **{f"chain-{i}": {"id": f"file-{i}", "filename": f"{i}.jsonl"} for i in (4, 9, 11)},
    )
    body, problems = forms.job_request(made, CHAIN)
    assert problems == [] and "method" not in body and "hyperparameters" not in body
    first, *later = body["tunewright"]["stages"]
    assert (first["name"], first["objective"], first["n_epochs"]) == ("sft", {"name": "sft"}, 3)
    assert "training_file" not in first and body["training_file"] == "file-1" and body["suffix"] == "s"
    assert later == [
        {
            "name": "own", "model": "stage:sft", "training_file": "file-4", "objective": {"name": "own"},
            "tuner": {"name": "lora", "r": 8}, "n_epochs": 2,
        },
        {"name": "own-2", "model": "stage:own", "training_file": "file-9", "objective": {"name": "own"}},
        {"name": "sft-2", "training_file": "file-11", "objective": {"name": "sft"}},
    ]  # fmt: skip
    told = forms.job_file(body, made)
    assert told["training_file"] == "a.jsonl" and [s.get("training_file") for s in told["stages"]][1] == "4.jsonl"
    assert list(parse_chain(told)) == ["sft", "own", "own-2", "sft-2"]
    _, problems = forms.job_request({**made, "chain-4": None, "stages": [{**stages[0], "n_epochs": "0"}]}, CHAIN)
    (said,) = problems
    assert "Stage 'own': Choose a training file. Epochs is 0; allowed: auto, or" in said


def test_rows_are_checked_as_the_objective_of_their_stage_reads_them() -> None:
    made = draft(stages=[{"id": 4, "objective": "grpo"}, {"id": 9, "objective": "own"}])
    found = {key: forms.row_format(key, made, CHAIN) for key in ("training_file", "chain-4", "chain-9")}
    assert found == {"training_file": "auto", "chain-4": "reinforcement", "chain-9": "auto"}
    made = draft(objective="grpo")
    found = {key: forms.row_format(key, made, CHAIN) for key in ("validation_file", "mix-1", "retain-1")}
    assert found == {"validation_file": "reinforcement", "mix-1": "reinforcement", "retain-1": "auto"}


def test_a_grader_is_part_of_openais_method_and_of_the_job_file() -> None:
    made = draft(objective="grpo", n_epochs="2", options={"objective.grpo": {"grader": json.dumps(RATE)}})
    body, problems = forms.job_request(made, CHAIN)
    assert problems == [] and body["tunewright"]["objective"] == {"name": "grpo"}
    assert body["method"]["reinforcement"]["grader"] == RATE
    told = parse_spec(forms.job_file(body, made))
    assert told.objective.options == {"grader": RATE} and told.n_epochs == 2
    _, problems = forms.job_request(draft(objective="grpo"), CHAIN)
    assert len(problems) == 1 and problems[0].startswith("Grader: say what gives the rewards")


# --- what does not go together ---------------------------------------------------------------------------------------


def test_what_cannot_be_chosen_is_closed_with_one_reason() -> None:
    assert rules.unfit("tuner", {"quantization": "nf4"}, DESCRIBE) == {
        "full": "trains the base itself, which nf4 freezes"
    }
    assert rules.unfit("tuner", {}, DESCRIBE) == {}
    closed = rules.unfit("quantization", {"tuner": "full"}, DESCRIBE)
    assert closed["nf4"] == "full trains the base itself" and "pip install bnb" in closed["int8"]
    assert set(rules.unfit("quantization", {}, DESCRIBE)) == {"int8"}
    assert set(rules.unfit("optimizer", {}, DESCRIBE)) == {"adamw8bit"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tuner": "full", "quantization": "nf4"}, "Quantization 'nf4' cannot be used: full trains the base itself."),
        ({"quantization": "int8"}, "Quantization 'int8' cannot be used: needs the package bnb"),
        ({"optimizer": "adamw8bit"}, "Optimizer 'adamw8bit' cannot be used: needs the package bnb"),
        ({"retain": [{"id": 1, "name": "replay"}]}, "Replay needs rows of what must not be forgotten"),
        ({"mix": {"ids": [1]}}, "Choose a file for further training file 1"),
        ({"mix": {"ids": [2], "weights": {"2": "x"}}, "mix-2": {"id": "file-2"}}, "Weight is 'x'"),
        ({"mix": {"ids": [2], "weights": {"0": "2"}, "temperature": "2"}, "mix-2": {"id": "file-2"}}, "one of them"),
    ],
)
def test_an_illegal_draft_is_refused_with_its_reason_once(changes: dict[str, Any], said: str) -> None:
    _, problems = forms.job_request(draft(**changes), DESCRIBE)
    assert len(problems) == 1 and said in problems[0], problems


def test_retain_mix_and_quantization_become_the_request() -> None:
    body, problems = forms.job_request(
        draft(
            tuner="bitfit",
            quantization="nf4",
            retain=[{"id": 4, "name": "replay"}, {"id": 6, "name": "l2sp"}],
            mix={"ids": [5, 9], "weights": {"0": "2", "9": "0.5"}},
            options={"retain-4.replay": {"share": "0.5"}},
            **{"retain-4": {"id": "file-old"}, "mix-5": {"id": "file-b"}, "mix-9": {"id": "file-c"}},
        ),
        DESCRIBE,
    )
    assert problems == []
    own = body["tunewright"]
    assert own["tuner"] == {"name": "bitfit"} and own["quantization"] == "nf4"
    assert own["retain"] == [{"name": "replay", "share": 0.5, "file": "file-old"}, {"name": "l2sp"}]
    assert own["mix"] == {"files": [{"file": "file-b"}, {"file": "file-c", "weight": 0.5}], "weight": 2.0}


@pytest.mark.parametrize(
    ("changes", "body"),
    [
        (
            {
                "recipe": "prompt",
                "options": {"recipe.prompt": {"system": "Be short."}},
                "temperature": "0",
                "suffix": "s",
            },
            {"recipe": {"name": "prompt", "system": "Be short."}, "suffix": "s", "decoding": {"temperature": 0.0}},
        ),
        (
            {"recipe": "proxy", "options": {"recipe.proxy": {"tuned": "ft:a", "small": "b"}}},
            {"recipe": {"name": "proxy", "tuned": "ft:a", "small": "b"}},
        ),
        (
            {"recipe": "mixture", "options": {"recipe.mixture": {"proposers": ["a", "b"]}}},
            {"recipe": {"name": "mixture", "proposers": ["a", "b"]}},
        ),
        ({"recipe": "few_shot", "rows": {"id": "file-1"}}, {"recipe": {"name": "few_shot"}, "data": ["file-1"]}),
        (
            {"recipe": "retrieval", "documents": [1, 3], "document-1": {"id": "f1"}, "document-3": {"id": "f3"}},
            {"recipe": {"name": "retrieval"}, "data": ["f1", "f3"]},
        ),
    ],
)
def test_a_draft_becomes_a_recipe(changes: dict[str, Any], body: dict[str, Any]) -> None:
    assert forms.recipe_request({"model": "tiny", **changes}, DESCRIBE) == ({"model": "tiny", **body}, [])


def test_all_that_a_recipe_lacks_comes_at_once() -> None:
    _, problems = forms.recipe_request({"recipe": "proxy", "max_tokens": "0"}, DESCRIBE)
    text = "\n".join(problems)
    for words in ("Tuned: choose a model", "Small: choose a model", "model below", "Longest answer is 0"):
        assert words in text
    assert forms.recipe_request({"recipe": "few_shot", "model": "m"}, DESCRIBE)[1] == ["Choose a file of solved rows."]


# --- the guard -------------------------------------------------------------------------------------------------------


async def greet(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


def ask(method: str = "GET", **headers: str) -> httpx.Response:
    """One request to a guard of 127.0.0.1:8001."""

    async def run() -> httpx.Response:
        guard = HostOriginGuard(greet, allowed_hosts("127.0.0.1", 8001))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://127.0.0.1:8001") as client:
            named = {k.replace("_", "-"): v for k, v in headers.items()}
            return await client.request(method, "/", headers=named)

    return asyncio.run(run())


OURS = "http://127.0.0.1:8001"
EVIL = "https://evil.example"


@pytest.mark.parametrize(
    ("status", "method", "headers"),
    [
        (200, "GET", {}),
        (200, "GET", {"host": "localhost:8001"}),
        (200, "POST", {"origin": OURS, "sec_fetch_site": "same-origin"}),
        (200, "GET", {"origin": EVIL, "sec_fetch_site": "cross-site"}),
        (403, "GET", {"host": "evil.example"}),
        (403, "GET", {"host": "127.0.0.1:8001/_nicegui"}),
        (403, "GET", {"host": "127.0.0.1:9999"}),
        (403, "POST", {"origin": EVIL}),
        (403, "POST", {"origin": "http://127.0.0.1:9999"}),
        (403, "POST", {"origin": "null"}),
        (403, "POST", {"sec_fetch_site": "same-site"}),
    ],
)
def test_the_guard(status: int, method: str, headers: dict[str, str]) -> None:
    answer = ask(method, **headers)
    assert answer.status_code == status
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert (b"hello" in answer.content) == (status == 200)


def test_the_names_that_are_answered() -> None:
    assert allowed_hosts("127.0.0.1", 1) == {"127.0.0.1:1", "localhost:1", "[::1]:1"}
    assert "10.0.0.5:1" in allowed_hosts("10.0.0.5", 1) and "10.0.0.6:1" not in allowed_hosts("10.0.0.5", 1)
    assert "127.0.0.1:1" in allowed_hosts("0.0.0.0", 1) and "0.0.0.0:1" not in allowed_hosts("0.0.0.0", 1)
    assert {"t.example", "t.example:1"} <= allowed_hosts("127.0.0.1", 1, ["T.example"])
    assert allowed_hosts("127.0.0.1", 1, ["t.example:443"]) - allowed_hosts("127.0.0.1", 1) == {"t.example:443"}


def test_two_host_headers_are_refused() -> None:
    sent: list[Any] = []

    async def run() -> None:
        async def send(message: Any) -> None:
            sent.append(message)

        guard = HostOriginGuard(greet, allowed_hosts("127.0.0.1", 8001))
        hosts = [(b"host", b"127.0.0.1:8001"), (b"host", b"evil.example")]
        await guard({"type": "http", "method": "GET", "headers": hosts}, None, send)

    asyncio.run(run())
    assert sent[0]["status"] == 400


def test_a_link_on_another_site_is_loaded_once_more_from_here() -> None:
    answer = ask(sec_fetch_site="cross-site", sec_fetch_mode="navigate")
    assert b'http-equiv="refresh"' in answer.content and "set-cookie" not in answer.headers
    assert ask(sec_fetch_site="cross-site", sec_fetch_mode="navigate", cookie="a=b").content == b"hello"


# --- feeds -----------------------------------------------------------------------------------------------------------


def test_one_poller_serves_all_who_look_and_remembers_errors() -> None:
    calls = 0

    async def fetch(old: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ApiDown("http://x")
        return old + 1

    async def run() -> None:
        feed = Feed(0, fetch, lambda _: 0.01)
        feed.look(), feed.look()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (feed.value, calls, feed.error) == (1, 1, None)
        await asyncio.sleep(0.1)
        assert calls == 2 and isinstance(feed.error, ApiDown) and feed.value == 1
        feed.hurry()
        await asyncio.sleep(0.05)
        assert feed.error is None and feed.value >= 2

    asyncio.run(run())


def test_a_feed_sleeps_when_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunewright.web.feeds.LOOK_SECONDS", 0.05)
    calls = 0

    async def fetch(old: int) -> int:
        nonlocal calls
        calls += 1
        return old + 1

    async def run() -> None:
        feed = Feed(0, fetch, lambda _: 0.01)
        feed.look()
        await asyncio.sleep(0.2)
        assert feed.idle
        before = calls
        await asyncio.sleep(0.05)
        assert calls == before
        feed.look()
        await asyncio.sleep(0.02)
        assert calls > before

    asyncio.run(run())


# --- chats and the client --------------------------------------------------------------------------------------------


class Script(httpx.AsyncBaseTransport):
    """An API that streams the given lines and remembers what was asked."""

    def __init__(self, *lines: str, status: int = 200, pause: float = 0.0) -> None:
        self.lines, self.status, self.pause = lines, status, pause
        self.asked: list[bytes] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(await request.aread())

        async def body() -> Any:
            for line in self.lines:
                yield f"{line}\n\n".encode()
                await asyncio.sleep(self.pause)

        return httpx.Response(self.status, content=body())


def api_of(script: Script) -> Api:
    return Api("http://api", None, httpx.AsyncClient(transport=script))


def piece(text: str) -> str:
    return f'data: {{"choices": [{{"delta": {{"content": "{text}"}}, "finish_reason": null}}]}}'


USAGE = 'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}}'


@pytest.mark.parametrize(
    ("statuses", "words", "share", "again"),
    [
        (("waiting", "waiting"), "Stage 1 of 2: a (waiting)", 0.0, False),
        (("validating_files", "waiting"), "Stage 1 of 2: a (validating files)", 0.0, True),
        (("succeeded", "running"), "Stage 2 of 2: b (running)", 0.5, True),
        (("succeeded", "succeeded"), "All 2 stages have finished.", 1.0, True),
    ],
)
def test_how_far_a_chain_is(statuses: tuple[str, str], words: str, share: float, again: bool) -> None:
    stages = [
        {"name": n, "status": s, "id": None if s == "waiting" else f"ftjob-{n}"}
        for n, s in zip("ab", statuses, strict=True)
    ]
    job = {"status": "failed", "tunewright": {"stages": stages}}
    assert stages_page.stages_of(job) == stages and stages_page.stages_of({"tunewright": {}}) == []
    assert (stages_page.chain_words(stages), stages_page.share_done(stages)) == (words, share)
    assert job_page.failed_chain(job) == again and not job_page.failed_chain({**job, "status": "running"})


def test_an_answer_streams_into_the_chat() -> None:
    script = Script(piece("It is "), piece("red."), USAGE, "data: [DONE]")

    async def run() -> chat.Chat:
        one = chat.Chat(chat.Settings(model="tiny", system="Be brief."))
        one.ask(api_of(script), "Colour?")
        assert one.running
        while one.running:
            await asyncio.sleep(0.01)
        return one

    done = asyncio.run(run())
    assert done.messages == [{"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "It is red."}]
    assert done.note == "5 tokens in · 2 out" and not done.error
    assert b'"role":"system","content":"Be brief."' in script.asked[0].replace(b'": "', b'":"')
    assert chat.restore(done.saved(), chat.Settings()).messages == done.messages


def test_stop_keeps_what_was_said_and_an_error_leaves_no_empty_answer() -> None:
    async def run(script: Script, seconds: float) -> chat.Chat:
        one = chat.Chat(chat.Settings(model="tiny"))
        one.ask(api_of(script), "Colour?")
        await asyncio.sleep(seconds)
        one.stop()
        while one.running:
            await asyncio.sleep(0.01)
        return one

    stopped = asyncio.run(run(Script(piece("It"), piece(" never ends"), pause=0.5), 0.1))
    assert stopped.messages[-1]["content"] == "It" and stopped.note == "stopped"
    refused = asyncio.run(run(Script('{"error": {"message": "No such model."}}', status=404), 0.1))
    assert [m["role"] for m in refused.messages] == ["user"] and refused.error == "No such model."


def test_the_python_code_asks_the_same() -> None:
    settings = chat.Settings(model="ft:a:b::c", system='Say "hi"', temperature=0.5, max_tokens=9)
    messages = [{"role": "user", "content": "quote ' \" ``` \n new line"}, {"role": "assistant", "content": "x"}]
    source = chat.as_python("http://127.0.0.1:8000", settings, messages, keyed=True)
    call = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and len(n.keywords) == 4)
    sent = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    assert sent == chat.request_body(settings, messages[:1])
    assert "sk-" not in source


def test_errors_become_readable() -> None:
    refused = error_from(400, b'{"error": {"message": "Bad.", "code": "c", "param": "p", "problems": [{"line": 3}]}}')
    assert (refused.message, refused.code, refused.param, refused.problems) == ("Bad.", "c", "p", [{"line": 3}])
    assert "502" in error_from(502, b"<html>").message
    with pytest.raises(ApiError, match="Engine gone"):
        delta_from({"error": {"message": "Engine gone"}})


def test_an_api_that_is_not_there() -> None:
    async def run() -> None:
        with pytest.raises(ApiDown, match=r"127\.0\.0\.1:9"):
            await Api("http://127.0.0.1:9").models()

    asyncio.run(run())


def test_a_multipart_body_is_read_back_as_it_was_meant() -> None:
    from python_multipart import parse_form

    name = 'a "b"\r\n\\c.jsonl'
    head, tail, kind = multipart_frame(name, {"purpose": "fine-tune"})
    body = head + b'{"x": 1}\n' + tail
    fields, files = [], []
    headers = {"Content-Type": kind.encode(), "Content-Length": str(len(body)).encode()}
    parse_form(headers, io.BytesIO(body), fields.append, files.append)
    assert [(f.field_name, f.value) for f in fields] == [(b"purpose", b"fine-tune")]
    files[0].file_object.seek(0)
    assert files[0].file_object.read() == b'{"x": 1}\n' and b"\n" not in files[0].file_name


def test_sessions_need_a_key_unless_the_api_is_open() -> None:
    api = Api("http://api")
    assert Desk(api).session("id", {}) is None
    signed_in = Desk(api).session("id", {"api_key": "sk-1"})
    assert signed_in is not None and signed_in.api.key == "sk-1"
    opened = Desk(api, public=True).session("id", {"api_key": "sk-1"})
    assert opened is not None and opened.api.key is None
