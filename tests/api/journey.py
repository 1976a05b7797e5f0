"""What users of OpenAI's fine-tuning do, with the unmodified SDK. A script: the tests run it once per SDK version.

`PYTHONPATH=.sdks/VERSION python journey.py URL [--all]` runs every `check_…` function in the order of this file; with
--all those named `newest_check_…`, too, of what the server does alike for every version. It prints one JSON line each:
{"check", "ok", "error", "seconds"}. Several versions may go to one server, one after the other.
"""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
import sys
import time
import traceback
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import openai
from openai import AsyncOpenAI, OpenAI

BASE = "tiny"
FINAL = ("succeeded", "failed", "cancelled")
MODEL_NAME = re.compile(r"^ft:[^:]+:[^:]+:[^:]*:[A-Za-z0-9]{8}$")
CSV_HEADER = ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def chat_row(i: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i} is it"}]}


def pair(i: int) -> dict[str, Any]:
    answers = f"a{i} is it", "no idea"
    preferred, rejected = ([{"role": "assistant", "content": text}] for text in answers)
    prompt = {"messages": [{"role": "user", "content": f"q{i}"}]}
    return {"input": prompt, "preferred_output": preferred, "non_preferred_output": rejected}


SFT = jsonl([chat_row(i) for i in range(12)])
SHORT = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 3.0}
VALID = jsonl([chat_row(i) for i in range(100, 104)])
# what a check can fail with: an assertion, the SDK's errors, or an answer of another form than expected
FAILURES = (AssertionError, openai.OpenAIError, AttributeError, LookupError, TypeError, ValueError, OSError)
ASK = [{"role": "user", "content": "q1"}]


class Journey:
    """The client, and what earlier checks made for later ones. `seen`: job statuses that parsed strictly."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = OpenAI(base_url=url, api_key="local", max_retries=0)
        self.strict = OpenAI(base_url=url, api_key="local", max_retries=0, _strict_response_validation=True)
        self.seen: set[str] = set()
        self.jobs = self.client.fine_tuning.jobs

    def upload(self, data: bytes, name: str = "train.jsonl", **more: Any) -> Any:
        return self.client.files.create(file=(name, data), purpose="fine-tune", **more)

    def wait(self, job_id: str, until: tuple[str, ...] = FINAL, seconds: float = 600, strict: bool = True) -> Any:
        """Poll through the strict client until the job has one of the statuses."""
        jobs = (self.strict if strict else self.client).fine_tuning.jobs
        end = time.time() + seconds
        while time.time() < end:
            job = jobs.retrieve(job_id)
            self.seen.add(job.status)
            if job.status in until:
                return job
            time.sleep(0.05)
        raise TimeoutError(f"the job stayed {job.status}; its events: {[e.message for e in self.events(job_id)]}")

    def events(self, job_id: str) -> list[Any]:
        return list(self.jobs.list_events(job_id))

    def ask(self, model: str, **more: Any) -> Any:
        return self.client.chat.completions.create(
            **{"model": model, "messages": ASK, "max_completion_tokens": 8, "temperature": 0, "seed": 1, **more}
        )

    @cached_property
    def train_file(self) -> Any:
        return self.upload(SFT)

    @cached_property
    def main_job(self) -> Any:
        """The finished main job: 4 epochs of 3 steps, with a validation file."""
        hyper = {"n_epochs": 4, "batch_size": 4, "learning_rate_multiplier": "auto"}
        job = self.strict.fine_tuning.jobs.create(
            model=BASE,
            training_file=self.train_file.id,
            validation_file=self.upload(VALID, "valid.jsonl").id,
            method={"type": "supervised", "supervised": {"hyperparameters": hyper}},
            suffix="My_App-1",
            seed=42,
            metadata={"team": "a", "run": "main"},
            extra_body={"tunewright": {"tuner": {"name": "lora", "r": 4}, "max_length": 128}},
        )
        self.seen.add(job.status)
        assert job.status in ("validating_files", "queued"), job.status
        assert job.fine_tuned_model is None and job.finished_at is None and job.trained_tokens is None
        assert job.result_files == [] and job.error is None and job.seed == 42
        return self.wait(job.id)

    @cached_property
    def bad_jobs(self) -> dict[str, Any]:
        """Jobs on bad files, made before the main one: name -> job."""
        quick = {"n_epochs": 1, "batch_size": 12}
        three_rows = self.upload(jsonl([chat_row(i) for i in range(3)]))
        no_role = self.upload(jsonl([{"messages": [{"content": "x"}]}] * 12))
        return {
            "few": self.jobs.create(model=BASE, training_file=three_rows.id, hyperparameters=quick),
            "no_role": self.jobs.create(model=BASE, training_file=no_role.id, hyperparameters=quick),
        }


def fails(call: Callable[[], Any], kind: type[openai.APIStatusError]) -> Any:
    """The exception that `call` must raise."""
    try:
        call()
    except kind as e:
        assert e.request_id and e.body["message"], e.body
        return e
    raise AssertionError(f"{kind.__name__} was not raised")


# --- the checks, in order --------------------------------------------------------------------------------------------


def check_upload_from_a_path(j: Journey) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"
        path.write_bytes(SFT)
        with open(path, "rb") as f:
            made = j.strict.files.create(file=f, purpose="fine-tune")
    assert made.id.startswith("file-") and made.bytes == len(SFT) and made.filename == "train.jsonl"
    assert j.strict.files.retrieve(made.id) == made
    assert j.client.files.wait_for_processing(made.id, poll_interval=0.1).status == "processed"


def check_file_round_trip(j: Journey) -> None:
    expiry: Any = {"anchor": "created_at", "seconds": 3600}
    made = j.upload(SFT, "ü x.jsonl", expires_after=expiry)
    assert made.filename == "ü x.jsonl" and made.expires_at == made.created_at + 3600
    assert j.client.files.content(made.id).read() == SFT
    e = fails(lambda: j.upload(SFT, expires_after={**expiry, "seconds": 10}), openai.BadRequestError)
    assert "3600" in e.body["message"] and "seconds" in e.param
    user_data = j.client.files.create(file=("a.txt", b"hello"), purpose="user_data")
    e = fails(lambda: j.client.files.content(user_data.id), openai.BadRequestError)
    assert e.body["message"] == "Not allowed to download files of purpose: user_data"


def check_files_list_page_delete(j: Journey) -> None:
    mine = [j.upload(SFT, f"{i}.jsonl").id for i in range(3)]
    ascending = [f.id for f in j.client.files.list(purpose="fine-tune", limit=2, order="asc")]
    assert [f for f in ascending if f in mine] == mine and len(ascending) == len(set(ascending))
    assert [f.id for f in j.client.files.list(purpose="fine-tune")] == ascending[::-1]
    assert j.client.files.delete(mine[0]).deleted is True
    for call in (j.client.files.retrieve, j.client.files.content, j.client.files.delete):
        e = fails(lambda call=call: call(mine[0]), openai.NotFoundError)
        assert e.body["message"] == f"No such File object: {mine[0]}" and e.param == "id" and e.code is None
    assert j.client.files.content(mine[1]).read() == SFT  # the same bytes under another id stay


def check_bad_uploads(j: Journey) -> None:
    e = fails(lambda: j.upload(b'{"messages": []}\n[1,2]\nhello\n'), openai.BadRequestError)
    assert "JSONL" in e.body["message"] and "ine 2" in e.body["message"] and e.param == "file", e.body
    fails(lambda: j.upload(b""), openai.BadRequestError)
    wrong: Any = "fine-tuning"
    e = fails(lambda: j.client.files.create(file=("a.jsonl", SFT), purpose=wrong), openai.BadRequestError)
    assert "fine-tune" in e.body["message"] and e.param == "purpose"


def check_unknown_ids_and_models(j: Journey) -> None:
    e = fails(lambda: j.jobs.retrieve("ftjob-x"), openai.NotFoundError)
    assert (e.code, e.param) == ("fine_tune_not_found", "fine_tune_id")
    assert e.body["message"] == "Could not find fine tune: ftjob-x"
    fails(lambda: j.jobs.cancel("ftjob-x"), openai.NotFoundError)
    fails(lambda: j.jobs.list_events("ftjob-x"), openai.NotFoundError)
    fails(lambda: j.jobs.checkpoints.list("ftjob-x"), openai.NotFoundError)
    e = fails(lambda: j.client.files.retrieve("file-x"), openai.NotFoundError)
    assert e.code is None and e.type == "invalid_request_error"
    e = fails(lambda: j.client.models.retrieve("ft:no"), openai.NotFoundError)
    assert e.code == "model_not_found" and e.body["message"] == "The model 'ft:no' does not exist"
    e = fails(lambda: j.ask("tinny"), openai.NotFoundError)
    assert e.code == "model_not_found" and e.type == "invalid_request_error"
    assert "The model `tinny` does not exist" in e.body["message"] and "'tiny'" in e.body["message"]


def check_bad_create_requests(j: Journey) -> None:
    def create(**changes: Any) -> Any:
        return lambda: j.jobs.create(**{"model": BASE, "training_file": j.train_file.id, **changes})

    def hyper(**values: Any) -> Any:
        return create(method={"type": "supervised", "supervised": {"hyperparameters": values}})

    cases: list[tuple[Any, str, str | None, str]] = [
        (create(training_file="file-x"), "training_file", None, "No such File object: file-x"),
        (create(model="tinny"), "model", "model_not_available", "'tiny'"),
        (create(model="/etc"), "model", "model_not_available", "not available"),
        (create(model="ft:tiny:personal::AAAAAAAA"), "model", "model_not_available", "not available"),
        (create(suffix="x" * 65), "suffix", "string_above_max_length", "64"),
        (create(suffix="a:b"), "suffix", None, "a:b"),
        (create(suffix="a/b"), "suffix", None, "a/b"),
        (create(seed=-1), "seed", "integer_below_min_value", ">= 0"),
        (create(metadata={str(i): "x" for i in range(17)}), "metadata", None, "16"),
        (create(metadata={"k" * 65: "x"}), "metadata", None, "64"),
        (create(metadata={"k": "x" * 513}), "metadata", None, "512"),
        (create(extra_body={"sufix": "x"}), "sufix", "unknown_parameter", "'suffix'"),
        (create(extra_body={"tunewright": {"tunner": "lora"}}), "tunewright.tunner", "unknown_parameter", "'tuner'"),
        (create(extra_body={"tunewright": {"tuner": "lorra"}}), "tuner", None, "'lora'"),
        (create(extra_body={"tunewright": {"tuner": {"name": "lora", "rr": 1}}}), "tuner", None, "'rr'"),
        (create(extra_body={"tunewright": {"n_epochs": 2}}), "tunewright.n_epochs", None, "hyperparameters"),
        (hyper(n_epochs=0), "method.supervised.hyperparameters.n_epochs", "integer_below_min_value", ">= 1"),
        (hyper(n_epochs=51), "method.supervised.hyperparameters.n_epochs", "integer_above_max_value", "<= 50"),
        (hyper(n_epochs="many"), "method.supervised.hyperparameters.n_epochs", "invalid_type", "a string"),
        (hyper(batch_size=257), "method.supervised.hyperparameters.batch_size", None, "<= 256"),
        (hyper(epochs=2), "method.supervised.hyperparameters.epochs", "unknown_parameter", "n_epochs"),
        (create(hyperparameters={"n_epochs": 1.5}), "hyperparameters.n_epochs", "invalid_type", "an integer"),
        (create(method={"type": "magic"}), "method.type", "invalid_value", "supervised"),
        (create(integrations=[{"type": "wandb", "wandb": {"project": "p"}}]), "integrations", None, "WANDB_API_KEY"),
    ]
    for call, param, code, text in cases:
        e = fails(call, openai.BadRequestError)
        assert e.param == param and e.type == "invalid_request_error", (param, e.body)
        assert (code is None or e.code == code) and text in e.body["message"], e.body
    eval_file = j.client.files.create(file=("e.jsonl", SFT), purpose="evals")
    e = fails(create(training_file=eval_file.id), openai.BadRequestError)
    assert e.param == "training_file" and "'fine-tune'" in e.body["message"]


def check_user_errors_are_sent_once(j: Journey) -> None:
    retrying = OpenAI(base_url=j.url, api_key="local")
    e = fails(lambda: retrying.fine_tuning.jobs.retrieve("ftjob-x"), openai.NotFoundError)
    assert e.response.request.headers["x-stainless-retry-count"] == "0"
    e = fails(lambda: retrying.chat.completions.create(model=BASE, messages=[]), openai.BadRequestError)
    assert e.response.request.headers["x-stainless-retry-count"] == "0"


def check_train(j: Journey) -> None:
    """Upload, create, poll: the job and everything it says of itself."""
    bad = j.bad_jobs  # they must not hold up the good one
    job = j.main_job
    assert job.status == "succeeded", job.error
    assert MODEL_NAME.match(job.fine_tuned_model) and ":My_App-1:" in job.fine_tuned_model
    assert job.model == BASE and job.seed == 42 and job.metadata == {"team": "a", "run": "main"}
    assert job.error is None and job.estimated_finish is None and isinstance(job.organization_id, str)
    assert job.finished_at >= job.created_at and job.trained_tokens > 0 and len(job.result_files) == 1
    numbers = job.method.supervised.hyperparameters
    assert (numbers.n_epochs, numbers.batch_size) == (4, 4) and isinstance(numbers.learning_rate_multiplier, float)
    assert job.hyperparameters.n_epochs == 4 and job.hyperparameters.batch_size == 4
    assert job.tunewright["tuner"]["name"] == "lora" and job.tunewright["tuner"]["r"] == 4
    assert job.tunewright["max_length"] == 128 and job.tunewright["objective"]["name"] == "sft"
    assert len(bad) == 2


def check_bad_training_files_fail_the_job(j: Journey) -> None:
    few = j.wait(j.bad_jobs["few"].id)
    assert few.status == "failed" and few.fine_tuned_model is None and few.result_files == []
    assert (few.error.code, few.error.param) == ("invalid_n_examples", "training_file")
    assert "3 example(s)" in few.error.message and "10" in few.error.message
    no_role = j.wait(j.bad_jobs["no_role"].id)
    assert no_role.status == "failed" and "role" in no_role.error.message
    assert "Example 1" in no_role.error.message and "train.jsonl line 1" in no_role.error.message
    said = [e for e in j.events(no_role.id) if e.level == "error"]
    assert [e.message for e in said] == [no_role.error.message]


def check_events(j: Journey) -> None:
    job = j.main_job
    paged = list(j.jobs.list_events(job.id, limit=3))
    assert len({e.id for e in paged}) == len(paged)
    assert [e.id for e in paged] == [e.id for e in j.strict.fine_tuning.jobs.list_events(job.id, limit=1000).data]
    texts = [e.message for e in reversed(paged)]
    wanted = [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {job.training_file} and validation file: {job.validation_file}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "The job has successfully completed",
    ]
    assert [t for t in texts if t in wanted] == wanted, texts
    metrics = [e for e in reversed(paged) if e.type == "metrics"]
    assert [e.data["step"] for e in metrics] == list(range(1, 13))
    for e in metrics:
        assert re.match(rf"Step {e.data['step']}/12: training loss=\d+\.\d+", e.message), e.message
        assert isinstance(e.data["train_loss"], float) and 0 <= e.data["train_mean_token_accuracy"] <= 1
        assert e.data["total_steps"] == 12
    assert any("valid_loss" in e.data for e in metrics)
    assert [e.data["step"] for e in metrics if "full_valid_loss" in e.data] == [3, 6, 9, 12]


def check_checkpoints(j: Journey) -> None:
    job = j.main_job
    found = j.strict.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [c.step_number for c in found] == [12, 9, 6]
    assert found[0].fine_tuned_model_checkpoint == job.fine_tuned_model
    assert [c.fine_tuned_model_checkpoint for c in found[1:]] == [
        f"{job.fine_tuned_model}:ckpt-step-{n}" for n in (9, 6)
    ]
    for c in found:
        assert c.id.startswith("ftckpt_") and c.metrics.full_valid_loss > 0 and c.metrics.train_loss > 0
        answer = j.ask(c.fine_tuned_model_checkpoint, max_completion_tokens=4)
        assert answer.model == c.fine_tuned_model_checkpoint
    assert [c.id for c in j.jobs.checkpoints.list(job.id, limit=1)] == [c.id for c in found]


def check_result_csv(j: Journey) -> None:
    job = j.main_job
    made = j.client.files.retrieve(job.result_files[0])
    assert (made.purpose, made.filename) == ("fine-tune-results", "step_metrics.csv")
    raw = j.client.files.content(made.id).read()
    rows = list(csv.DictReader(io.StringIO(raw.decode())))
    assert list(rows[0])[:5] == CSV_HEADER and len(rows) == 12 and made.bytes == len(raw)
    assert all(float(r["train_loss"]) > 0 for r in rows)
    told = {e.data["step"]: e.data["train_loss"] for e in j.events(job.id) if e.type == "metrics"}
    assert all(abs(float(r["train_loss"]) - told[int(r["step"])]) < 1e-4 for r in rows)


def check_chat(j: Journey) -> None:
    model = j.main_job.fine_tuned_model
    answer = j.strict.chat.completions.create(model=model, messages=ASK, max_completion_tokens=8)
    assert answer.model == model and answer.id.startswith("chatcmpl-")
    usage = answer.usage
    assert usage.prompt_tokens > 0 and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens <= 8
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].finish_reason in ("stop", "length")
    before, after = j.ask(BASE), j.ask(model)
    assert before.choices[0].message.content != after.choices[0].message.content
    assert j.ask(model).choices[0].message.content == after.choices[0].message.content


def check_stream(j: Journey) -> None:
    model = j.main_job.fine_tuned_model
    whole = j.ask(model).choices[0].message.content
    chunks = list(j.ask(model, stream=True, stream_options={"include_usage": True}))
    assert len({c.id for c in chunks}) == 1 and chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert len([c for c in chunks if c.choices and c.choices[0].finish_reason]) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    assert all(c.usage is None for c in chunks[:-1])
    plain = list(j.ask(model, stream=True))
    assert all(c.choices and c.usage is None for c in plain)
    list(j.strict.chat.completions.create(model=model, messages=ASK, max_completion_tokens=4, stream=True))


def check_sampling(j: Journey) -> None:
    model = j.main_job.fine_tuned_model
    more = {"n": 3, "temperature": 0.7, "top_p": 0.9, "seed": 7, "max_completion_tokens": 12}
    first = j.ask(model, **more, logprobs=True, top_logprobs=5)
    assert [c.index for c in first.choices] == [0, 1, 2]
    assert [c.message.content for c in j.ask(model, **more).choices] == [c.message.content for c in first.choices]
    content = [t for c in first.choices for t in c.logprobs.content]
    assert len(content) == first.usage.completion_tokens
    assert all(len(t.top_logprobs) == 5 and t.logprob <= 0 for t in content)
    for choice in first.choices:
        shown = [t for t in choice.logprobs.content if not t.token.startswith("<|")]  # special tokens are not text
        text = b"".join(bytes(t.bytes or b"") for t in shown).decode("utf-8", "ignore")
        assert text == choice.message.content.replace("\ufffd", ""), (text, choice.message.content)
    text = j.ask(BASE, max_completion_tokens=12).choices[0].message.content
    cut = j.ask(BASE, max_completion_tokens=12, stop=[text[2:4]])
    assert cut.choices[0].message.content == text[: text.index(text[2:4])] and cut.choices[0].finish_reason == "stop"
    assert j.ask(BASE, max_completion_tokens=3).choices[0].finish_reason == "length"
    assert len(j.ask(BASE, extra_body={"top_k": 1}, temperature=1.5).choices) == 1


def check_bad_chat_requests(j: Journey) -> None:
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"temperature": 3}, "temperature", "<= 2"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "assistent", "content": "x"}]}, "messages[0].role", "'assistant'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "content"),
        ({"response_format": {"type": "json_object"}}, "response_format", "format"),
        ({"tool_choice": "required"}, "tool_choice", "tool"),
        ({"store": True}, "store", "store"),
        ({"n": 0}, "n", ">= 1"),
        ({"stop": ["a"] * 5}, "stop", "1 to 4"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens", "same"),
        ({"extra_body": {"temprature": 1}}, "temprature", "'temperature'"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "messages", "512"),
    ]
    for changes, param, text in cases:
        e = fails(lambda changes=changes: j.ask(BASE, **changes), openai.BadRequestError)
        assert e.param == param and text in e.body["message"], (changes, e.body)
    harmless: dict[str, Any] = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    assert j.ask(BASE, **harmless, response_format={"type": "text"}).usage.completion_tokens > 0
    parts = [{"role": "user", "content": [{"type": "text", "text": "q1"}]}]
    assert j.ask(BASE, messages=parts).choices[0].message.content == j.ask(BASE).choices[0].message.content


def check_models(j: Journey) -> None:
    job = j.main_job
    ids = [m.id for m in j.strict.models.list()]
    assert BASE in ids and job.fine_tuned_model in ids and f"{job.fine_tuned_model}:ckpt-step-9" in ids
    assert j.strict.models.retrieve(job.fine_tuned_model).owned_by == job.organization_id
    assert j.client.models.retrieve("org/tiny-2").id == "org/tiny-2"
    fails(lambda: j.client.models.delete(BASE), openai.PermissionDeniedError)
    assert j.client.models.retrieve(BASE).owned_by == "system"
    e = fails(lambda: j.client.models.delete("ft:123"), openai.NotFoundError)
    assert e.body["message"] == "The model 'ft:123' does not exist" and e.param == "model"


def check_dpo(j: Journey) -> None:
    """From the tuned model, with OpenAI's method; and the wrong file."""
    pairs = j.upload(jsonl([pair(i) for i in range(12)]), "pairs.jsonl")
    dpo = {"type": "dpo", "dpo": {"hyperparameters": {**SHORT, "beta": "auto"}}}
    made = j.strict.fine_tuning.jobs.create(model=j.main_job.fine_tuned_model, training_file=pairs.id, method=dpo)
    assert made.method.type == "dpo" and made.method.dpo.hyperparameters.batch_size == 4
    mistaken = j.jobs.create(model=BASE, training_file=j.train_file.id, method={"type": "dpo"})
    done = j.wait(made.id)
    assert done.status == "succeeded", done.error
    numbers = done.method.dpo.hyperparameters
    assert (numbers.beta, numbers.n_epochs, numbers.batch_size, numbers.learning_rate_multiplier) == (0.1, 2, 4, 3.0)
    steps = [e.data for e in reversed(j.events(done.id)) if e.type == "metrics"]
    assert abs(steps[0]["train_loss"] - 0.6931471805599453) < 1e-9 and steps[0]["train_reward_margin"] == 0.0
    assert steps[-1]["train_reward_margin"] > 0 and 0 <= steps[-1]["train_reward_accuracy"] <= 1
    assert len(steps) == 6
    assert j.ask(done.fine_tuned_model).usage.completion_tokens > 0
    rows = list(csv.DictReader(io.StringIO(j.client.files.content(done.result_files[0]).read().decode())))
    assert list(rows[0])[:5] == CSV_HEADER and float(rows[-1]["train_reward_margin"]) > 0
    wrong = j.wait(mistaken.id)
    text = (
        "Input file train.jsonl is in the fine-tune-chat format, but the specified fine-tuning job is not using "
        "'supervised' as the training method (provided method=dpo)."
    )
    assert wrong.status == "failed" and text in wrong.error.message, wrong.error


def newest_check_other_preferences(j: Journey) -> None:
    """Through the tunewright object; OpenAI has no word for the method."""
    marks = [{"prompt": f"q{i}", "completion": f"a{i} is it", "label": i % 2 == 0} for i in range(12)]
    made = j.jobs.create(
        model=BASE,
        training_file=j.upload(jsonl(marks), "marks.jsonl").id,
        hyperparameters=SHORT,
        extra_body={"tunewright": {"objective": {"name": "kto", "beta": 0.2}}},
    )
    kto = j.wait(made.id)
    assert kto.status == "succeeded" and kto.method is None, kto.error
    assert kto.tunewright["objective"]["name"] == "kto" and kto.tunewright["objective"]["beta"] == 0.2


def check_reinforcement(j: Journey) -> None:
    """OpenAI's method with a grader over the rows' own fields; what it cannot have is refused at once."""
    rows = [{"messages": [{"role": "user", "content": f"q{i}"}], "wanted": "a"} for i in range(12)]
    train, valid = (j.upload(jsonl(part), f"{name}.jsonl") for part, name in ((rows, "rft"), (rows[:3], "rft-valid")))
    grader = {
        "type": "string_check", "name": "has an a", "operation": "ilike",
        "input": "{{ sample.output_text }}", "reference": "{{ item.wanted }}",
    }  # fmt: skip
    hyper = {"n_epochs": 1, "batch_size": 6, "compute_multiplier": 0.5, "eval_interval": 1, "eval_samples": 2}
    objective = {"objective": {"name": "grpo", "max_completion_tokens": 6}}

    def ask(grader: Any, **more: Any) -> Any:
        method = {"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": {**hyper, **more}}}
        return j.strict.fine_tuning.jobs.create(
            model=BASE,
            training_file=train.id,
            validation_file=valid.id,
            method=method,
            extra_body={"tunewright": objective},
        )

    e = fails(lambda: ask(grader, reasoning_effort="low"), openai.BadRequestError)
    assert e.param == "method.reinforcement.hyperparameters.reasoning_effort"
    e = fails(lambda: ask({**grader, "operation": "same"}), openai.BadRequestError)
    assert e.param.startswith("method.reinforcement.grader")
    made = ask(grader)
    wrong = j.jobs.retrieve(ask({**grader, "reference": "{{ item.wnated }}"}).id)
    assert made.method.type == "reinforcement" and made.method.reinforcement.grader.to_dict() == grader
    done = j.wait(made.id)
    assert done.status == "succeeded", done.error
    numbers = done.method.reinforcement.hyperparameters
    assert (numbers.batch_size, numbers.compute_multiplier, numbers.eval_interval) == (6, 0.5, 1)
    steps = [e for e in reversed(j.events(done.id)) if e.type == "metrics"]
    assert len(steps) == 2 and re.match(r"Step 1/2 , train mean reward=\d\.\d\d", steps[0].message)
    assert all(0 <= s.data[f"{k}_mean_reward"] <= 1 for s in steps for k in ("train", "valid"))
    assert steps[-1].data["full_valid_mean_parse_error"] == 0
    assert j.ask(done.fine_tuned_model).usage.completion_tokens > 0
    ended = j.wait(wrong.id)
    assert ended.status == "failed" and ended.error.code == "invalid_variable_error", ended.error
    assert "no row has 'wnated'" in ended.error.message


def check_graders(j: Journey) -> None:
    graders = j.strict.fine_tuning.alpha.graders
    same: Any = {
        "type": "string_check",
        "name": "same",
        "input": "{{ sample.output_text }}",
        "reference": "{{ item.label }}",
        "operation": "eq",
    }
    told = graders.run(grader=same, item={"label": "cat"}, model_sample="cat")
    assert told.reward == 1.0 and told.metadata.name == "same" and told.metadata.type == "string_check"
    errors = told.metadata.errors.to_dict()
    assert len(errors) == 14 and not any(errors.values())
    missing = graders.run(grader=same, item={}, model_sample="cat")
    assert missing.reward == 0.0 and missing.metadata.errors.invalid_variable_error is True
    checked = graders.validate(grader=same).grader
    assert checked is not None and checked.to_dict() == same
    near: Any = {k: v for k, v in same.items() if k != "operation"}
    near |= {"type": "text_similarity", "name": "near", "evaluation_metric": "fuzzy_match"}
    both: Any = {"type": "multi", "name": "both", "graders": {"a": same, "b": near}, "calculate_output": "(a + b) / 4"}
    told = graders.run(grader=both, item={"label": "cat"}, model_sample="cat")
    assert told.reward == 0.5 and told.sub_rewards == {"a": 1.0, "b": 1.0}
    shown: Any = j.client.fine_tuning.alpha.graders.validate(grader=both).grader
    assert shown.to_dict()["graders"].keys() == {"a", "b"}
    judge: Any = {"type": "score_model", "name": "j", "model": BASE, "input": [{"role": "user", "content": "Rate it."}]}
    judge["sampling_params"] = {"max_completions_tokens": 4}
    told = graders.run(grader=judge, model_sample="cat")
    errors = told.metadata.errors.to_dict()
    assert errors["model_grader_parse_error"] is True and told.metadata.sampled_model_name == BASE
    assert told.metadata.token_usage and told.to_dict()["model_grader_token_usage_per_model"].keys() == {BASE}
    for wrong in ({**same, "operation": "equals"}, {**same, "input": "{{ itm.x }}"}, {**same, "type": "x"}):
        e = fails(lambda wrong=wrong: graders.validate(grader=wrong), openai.BadRequestError)
        assert e.param.startswith("grader.")


def check_continue_from_a_checkpoint(j: Journey) -> None:
    job = j.main_job
    parent = f"{job.fine_tuned_model}:ckpt-step-9"
    child = j.jobs.create(model=parent, training_file=job.training_file, hyperparameters={"n_epochs": 1})
    assert child.method.type == "supervised" and child.hyperparameters.n_epochs == 1
    assert isinstance(child.seed, int)
    assert j.client.models.delete(parent).deleted is True  # a child keeps its own copy
    fails(lambda: j.ask(parent), openai.NotFoundError)
    done = j.wait(child.id)
    assert done.status == "succeeded" and done.fine_tuned_model.startswith(f"ft:{BASE}:"), done.error

    def first_loss(job_id: str) -> float:
        return next(e.data["train_loss"] for e in reversed(j.events(job_id)) if e.type == "metrics")

    assert first_loss(done.id) < first_loss(job.id)
    assert j.ask(done.fine_tuned_model).usage.completion_tokens > 0


def check_cancel(j: Journey) -> None:
    long = j.jobs.create(model=BASE, training_file=j.train_file.id, hyperparameters={"n_epochs": 50, "batch_size": 1})
    queued = j.jobs.create(model=BASE, training_file=j.train_file.id, hyperparameters={"n_epochs": 1})
    j.wait(long.id, ("running",))
    assert j.wait(queued.id, ("queued", "running")).status == "queued"
    assert j.jobs.cancel(queued.id).status == "cancelled"
    j.jobs.cancel(long.id)
    ended = j.wait(long.id, seconds=300)
    assert ended.status == "cancelled" and ended.fine_tuned_model is None and ended.finished_at
    assert ended.error is None
    for finished in (ended.id, j.main_job.id):
        e = fails(lambda finished=finished: j.jobs.cancel(finished), openai.BadRequestError)
        assert finished in e.body["message"] or "cancel" in e.body["message"].lower()
        fails(lambda finished=finished: j.jobs.pause(finished), openai.BadRequestError)


def check_every_status_was_strictly_valid(j: Journey) -> None:
    assert j.seen >= {"validating_files", "queued", "running", "succeeded", "failed", "cancelled"}, j.seen


def check_jobs_list(j: Journey) -> None:
    every = list(j.jobs.list(limit=2))
    assert len({x.id for x in every}) == len(every)
    assert [x.created_at for x in every] == sorted((x.created_at for x in every), reverse=True)
    tagged = list(j.jobs.list(limit=1, extra_query={"metadata[team]": "a"}))
    assert j.main_job.id in [x.id for x in tagged] and all(x.metadata["team"] == "a" for x in tagged)
    untagged = list(j.jobs.list(extra_query={"metadata": "null"}))
    assert untagged and all(not x.metadata for x in untagged)
    assert {x.id for x in every} == {x.id for x in tagged} | {x.id for x in untagged}
    fails(lambda: j.jobs.list(after="ftjob-x"), openai.NotFoundError)


def check_raw_responses_and_base_urls(j: Journey) -> None:
    raw = j.client.models.with_raw_response.list()
    again = j.client.models.with_raw_response.list()
    assert raw.headers["x-request-id"] != again.headers["x-request-id"] and BASE in [m.id for m in raw.parse().data]
    with_slash = OpenAI(base_url=j.url + "/", api_key="local", max_retries=0)
    assert with_slash.models.retrieve(BASE).id == BASE


def check_async_and_concurrency(j: Journey) -> None:
    async def many() -> None:
        client = AsyncOpenAI(base_url=j.url, api_key="local", max_retries=0)

        async def text(question: str, stream: bool) -> str:
            wanted: Any = {"model": BASE, "messages": [{"role": "user", "content": question}]}
            wanted |= {"max_completion_tokens": 6, "temperature": 0}
            if not stream:
                return (await client.chat.completions.create(**wanted)).choices[0].message.content or ""
            chunks = [c async for c in await client.chat.completions.create(**wanted, stream=True)]
            return "".join(c.choices[0].delta.content or "" for c in chunks)

        questions = [f"q{i}" for i in range(5)]
        answers = await asyncio.gather(*(text(q, s) for q in questions for s in (False, True)))
        assert answers[::2] == answers[1::2]
        uploads = (client.files.create(file=("a.jsonl", SFT), purpose="fine-tune") for _ in range(10))
        assert len({f.id for f in await asyncio.gather(*uploads)}) == 10
        assert BASE in [m.id async for m in client.models.list()]

    asyncio.run(many())


def check_pause_and_resume(j: Journey) -> None:
    job = j.jobs.create(model=BASE, training_file=j.train_file.id, hyperparameters={"n_epochs": 10, "batch_size": 1})
    fails(lambda: j.jobs.resume(job.id), openai.BadRequestError)
    j.wait(job.id, ("running",))
    end = time.time() + 300
    while not any(e.type == "metrics" for e in j.events(job.id)) and time.time() < end:
        time.sleep(0.05)
    j.jobs.pause(job.id)
    paused = j.wait(job.id, ("paused",), strict=False)
    assert paused.error is None and paused.fine_tuned_model is None
    fails(lambda: j.jobs.pause(job.id), openai.BadRequestError)
    done_before = [e.data["step"] for e in j.events(job.id) if e.type == "metrics"]
    assert j.jobs.resume(job.id).status in ("queued", "running")
    done = j.wait(job.id)
    assert done.status == "succeeded", done.error
    steps = [e.data["step"] for e in reversed(j.events(job.id)) if e.type == "metrics"]
    assert steps == list(range(1, 121)) and max(done_before) < 120


def newest_check_same_seed_same_losses(j: Journey) -> None:
    def losses(seed: int) -> list[float]:
        job = j.jobs.create(
            model=BASE, training_file=j.train_file.id, seed=seed, hyperparameters={"n_epochs": 2, "batch_size": 4}
        )
        assert j.wait(job.id).status == "succeeded"
        return [e.data["train_loss"] for e in reversed(j.events(job.id)) if e.type == "metrics"]

    first = losses(7)
    assert first == losses(7) and first != losses(8)


def newest_check_deleted_model(j: Journey) -> None:
    job = j.jobs.create(model=BASE, training_file=j.train_file.id, hyperparameters={"n_epochs": 1})
    model = j.wait(job.id).fine_tuned_model
    assert j.ask(model).usage.completion_tokens > 0
    assert j.client.models.delete(model).deleted is True
    assert fails(lambda: j.ask(model), openai.NotFoundError).code == "model_not_found"
    assert j.jobs.retrieve(job.id).fine_tuned_model == model


def main() -> None:
    journey = Journey(sys.argv[1])
    wanted = ("check_", "newest_check_") if "--all" in sys.argv else "check_"
    for name, check in list(globals().items()):
        if name.startswith(wanted):
            start, error = time.monotonic(), None
            try:
                check(journey)
            except FAILURES:
                error = traceback.format_exc()
            line = {"check": name, "ok": error is None, "error": error, "seconds": time.monotonic() - start}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
