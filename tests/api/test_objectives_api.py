"""Objectives over the API: rows that do not fit one, graders that do not fit the rows, and a job of every objective."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import LiveServer, make_home

import tiny
from teacher_kit import completion, teacher_server
from tunewright.core import outbound
from tunewright.objectives import OBJECTIVES

JOBS, CHECK = "/v1/fine_tuning/jobs", "/v1/tunewright/jobs/check"
CHATS, PAIRS = tiny.sft_rows(12), tiny.pair_rows(12)
PROMPTS = [{"messages": row["messages"][:2], "want": "a"} for row in CHATS]
TEXTS = [{"text": f"The sea is blue, and stone {i} is grey."} for i in range(12)]
LABELS = [{"text": f"Thing {i}", "label": "ab"[i % 2]} for i in range(12)]
NUMBERS = [{"text": f"Thing {i}", "label": i / 10} for i in range(12)]
SEVERAL = [{"text": f"Thing {i}", "label": ["a", "b"][: 1 + i % 2]} for i in range(12)]
MARKED = [{**row, "label": bool(i % 2)} for i, row in enumerate(CHATS)]
SAME = {
    "type": "string_check", "name": "same", "operation": "ilike",
    "input": "{{ sample.output_text }}", "reference": "{{ item.want }}",
}  # fmt: skip
WRONG = {**SAME, "reference": "{{ item.wnat }}"}
NO_TYPE = {**SAME, "type": "string_chek"}


def upload(http: httpx.Client, rows: list[dict[str, Any]]) -> str:
    data = "".join(json.dumps(row) + "\n" for row in rows)
    sent = http.post("/v1/files", files={"file": ("rows.jsonl", data)}, data={"purpose": "fine-tune"})
    return sent.json()["id"]


def create(http: httpx.Client, rows: list[dict[str, Any]], objective: Any, **body: Any) -> httpx.Response:
    own = {"tunewright": {"objective": objective}} if objective else {}
    return http.post(JOBS, json={"model": "tiny", "training_file": upload(http, rows), **own, **body})


def ended(http: httpx.Client, job: dict[str, Any], seconds: float = 300) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while (now := http.get(f"{JOBS}/{job['id']}").json())["status"] not in ("succeeded", "failed"):
        assert time.monotonic() < end, now
        time.sleep(0.1)
    return now


@pytest.mark.parametrize(
    ("rows", "objective", "code", "words"),
    [
        (CHATS, "dpo", "invalid_training_file", "fine-tune-chat format"),
        (PAIRS, "sft", "invalid_training_file", "Objectives for such rows: cpo, dpo"),
        (PAIRS, {"name": "grpo", "grader": SAME}, "invalid_training_file", "Objectives for such rows: cpo, dpo"),
        (TEXTS, "reward", "invalid_training_file", "Objectives for such rows: distill, pretrain"),
        (CHATS, "classify", "invalid_training_file", "'classify' needs the format text with labels"),
        ([*MARKED[:4], {**CHATS[5], "label": "maybe"}, *MARKED[5:]], "kto", "invalid_training_file", "maybe"),
        (
            PROMPTS,
            {"name": "grpo", "grader": WRONG},
            "invalid_variable_error",
            "no row has 'wnat'. Did you mean 'want'?",
        ),
    ],
)
def test_rows_that_do_not_fit_fail_before_anything_is_loaded(
    http: httpx.Client, rows: list[dict[str, Any]], objective: Any, code: str, words: str
) -> None:
    made = create(http, rows, objective)
    assert made.status_code == 200, made.text
    done = ended(http, made.json())
    assert done["status"] == "failed" and done["error"]["code"] == code, done["error"]
    assert words in done["error"]["message"], done["error"]
    messages = [e["message"] for e in http.get(f"{JOBS}/{done['id']}/events").json()["data"]]
    assert not any("Loading the model" in m for m in messages)


@pytest.mark.parametrize(
    ("objective", "param", "words"),
    [
        ({"name": "grpo", "grader": NO_TYPE}, "objective.grader.type", "Did you mean 'string_check'?"),
        ({"name": "ppo", "grader": SAME, "reward_model": "tiny"}, "objective", "give one of them"),
        ({"name": "ppo", "reward_model": "tiny"}, "objective", "'tiny' is no reward model"),
        ({"name": "distill", "teacher": "tinny"}, "tunewright.objective.teacher", "Did you mean 'tiny'?"),
        ({"name": "answers"}, "objective", "needs its option 'endpoint'"),
        ({"name": "rlaif", "endpoint": "http://127.0.0.1:1/v1", "model": "m"}, "endpoint", "TUNEWRIGHT_ENDPOINTS"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_refused_at_once(
    http: httpx.Client, objective: dict[str, Any], param: str, words: str
) -> None:
    """By the create request and by the check of it in the same words, and no job is made."""
    before = len(http.get(JOBS, params={"limit": 1000}).json()["data"])
    answer = create(http, PROMPTS, objective)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and words in error["message"], error
    asked = {"model": "tiny", "training_file": upload(http, PROMPTS), "tunewright": {"objective": objective}}
    assert http.post(CHECK, json=asked).json()["message"] == error["message"]
    assert len(http.get(JOBS, params={"limit": 1000}).json()["data"]) == before


ROLLS = {"grader": SAME, "max_completion_tokens": 4}
USER = {"role": "user", "content": "What colour is the sea?"}
SCORED = [USER, {"role": "assistant", "content": "It is blue."}]
# objective -> its rows and options; what asks another server is given one
EVERY: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "answers": (CHATS, {"endpoint": "", "model": "m"}),
    "classify": (LABELS, {}),
    "cpo": (PAIRS, {}),
    "distill": (CHATS, {"teacher": "tiny"}),
    "dpo": (PAIRS, {}),
    "grpo": (PROMPTS, {**ROLLS, "group_size": 2}),
    "kto": (MARKED, {}),
    "multilabel": (SEVERAL, {}),
    "orpo": (PAIRS, {}),
    "ppo": (PROMPTS, ROLLS),
    "pretrain": (TEXTS, {}),
    "regress": (NUMBERS, {}),
    "reward": (PAIRS, {}),
    "rlaif": (PAIRS, {"endpoint": "", "model": "m"}),
    "rloo": (PROMPTS, {**ROLLS, "group_size": 2}),
    "sft": (CHATS, {}),
    "simpo": (PAIRS, {}),
}


def said(body: dict[str, Any]) -> Any:
    """As a judge the shorter of two answers, as a teacher always the same."""
    answers = re.findall(r"<answer \d>\n(.*?)\n</answer \d>", body["messages"][-1]["content"], re.DOTALL)
    if len(answers) != 2:
        return 200, completion("It is blue.")
    return 200, completion("1" if len(answers[0]) < len(answers[1]) else "2")


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_every_objective_of_the_table_is_trained_and_served(
    tuner: str, tmp_path: Path, tiny_model_dir: Path, described: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a base and, with adapters, from a tuned model; what comes out answers a chat, each in its way."""
    assert set(EVERY) == set(OBJECTIVES)
    common = {"tuner": tuner, "dtype": "float32", "threads": 1}
    short = {"n_epochs": 1, "batch_size": 4}
    with teacher_server(said) as teacher:
        monkeypatch.setenv(outbound.VARIABLE, teacher.url)
        home = make_home(tmp_path / "home", tiny_model_dir, described)
        with LiveServer(home, "--open") as mine, httpx.Client(base_url=mine.url, timeout=300) as http:

            def made(name: str, model: str) -> dict[str, Any]:
                rows, options = EVERY[name]
                options = {**options, **({"endpoint": teacher.url} if "endpoint" in options else {})}
                own = {"tunewright": {**common, "objective": {"name": name, **options}}}
                answer = create(http, rows, None, model=model, hyperparameters=short, **own)
                assert answer.status_code == 200, answer.text
                return answer.json()

            starts = ["tiny"]
            if tuner == "lora":
                starts.append(ended(http, made("sft", "tiny"))["fine_tuned_model"])
            jobs = {(name, model): made(name, model) for name in EVERY for model in starts}
            for (name, model), job in jobs.items():
                done = ended(http, job, 900)
                assert done["status"] == "succeeded", (name, model, done["error"])
                messages = SCORED if name == "reward" else [USER]
                ask = {"model": done["fine_tuned_model"], "messages": messages, "max_tokens": 4}
                told = http.post("/v1/chat/completions", json=ask)
                assert told.status_code == 200 and "content" in told.json()["choices"][0]["message"], told.text
