"""/v1/fine_tuning/alpha/graders: OpenAI's answers for good and bad graders. journey.py has them with the SDK."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tunewright.graders.base import ERRORS
from tunewright.graders.sandbox import trouble

RUN, VALIDATE = (f"/v1/fine_tuning/alpha/graders/{name}" for name in ("run", "validate"))
SC = {
    "type": "string_check",
    "name": "same",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.label }}",
    "operation": "eq",
}
TS = {k: v for k, v in SC.items() if k != "operation"} | {"type": "text_similarity", "evaluation_metric": "fuzzy_match"}
JUDGE = {"type": "score_model", "name": "j", "model": "tiny", "input": [{"role": "user", "content": "Rate it."}]}


def run(http: httpx.Client, grader: dict[str, Any], sample: str = "cat", item: Any = None) -> dict[str, Any]:
    body = {"grader": grader, "model_sample": sample, "item": {"label": "cat"} if item is None else item}
    answer = http.post(RUN, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_run_has_openais_shape(http: httpx.Client) -> None:
    told = run(http, SC)
    assert told["metadata"].pop("execution_time") >= 0
    assert told == {
        "reward": 1.0,
        "metadata": {
            "name": "same", "type": "string_check", "errors": ERRORS, "scores": {}, "token_usage": None,
            "sampled_model_name": None,
        },
        "sub_rewards": {},
        "model_grader_token_usage_per_model": {},
        "tunewright": {"why": ""},
    }  # fmt: skip


def test_what_goes_wrong_with_a_sample_is_in_the_errors(http: httpx.Client) -> None:
    told = run(http, SC, item={"lable": "cat"})
    errors = told["metadata"]["errors"]
    assert told["reward"] == 0.0 and errors == {**ERRORS, "invalid_variable_error": True}
    assert "Did you mean 'lable'" in told["tunewright"]["why"]
    assert http.post(RUN, json={"grader": SC, "model_sample": "cat"}).json()["metadata"]["errors"] == errors
    multi = {"type": "multi", "name": "m", "graders": {"a": SC, "b": TS}, "calculate_output": "a / (a - b)"}
    told = run(http, multi)
    assert told["metadata"]["errors"]["formula_parse_error"] and told["sub_rewards"] == {"a": 1.0, "b": 1.0}
    assert run(http, {**multi, "calculate_output": "(a + b) / 4"})["reward"] == 0.5


@pytest.mark.skipif(bool(trouble()), reason="no namespaces here")
def test_a_python_grader_that_raises_or_never_ends(http: httpx.Client) -> None:
    def python(body: str) -> dict[str, Any]:
        source = f"def grade(sample, item):\n    {body}"
        return run(http, {"type": "python", "name": "p", "source": source, "tunewright": {"timeout": 0.5}})

    assert python("return len(sample['output_text']) / 4")["reward"] == 0.75
    for body, words in (("return 1 / 0", "ZeroDivisionError"), ("while True: pass", "took more than 0.5 s")):
        errors = python(body)["metadata"]["errors"]
        assert errors["python_grader_runtime_error"] and words in errors["python_grader_runtime_error_details"]


@pytest.mark.slow
def test_a_judge_that_is_a_model_of_this_server(http: httpx.Client) -> None:
    """The tiny model answers nonsense, in which there is no number."""
    told = run(http, {**JUDGE, "sampling_params": {"max_completions_tokens": 5}})
    assert told["metadata"]["errors"] == {**ERRORS, "model_grader_parse_error": True}
    usage = told["model_grader_token_usage_per_model"]["tiny"]
    assert (
        usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] == told["metadata"]["token_usage"]
    )
    assert told["metadata"]["sampled_model_name"] == "tiny" and 0 < usage["completion_tokens"] <= 5
    told = run(http, {**JUDGE, "sampling_params": {"reasoning_effort": "low"}})
    assert "reasoning_effort" in told["metadata"]["errors"]["model_grader_server_error_details"]


def test_validate_gives_the_grader_back(http: httpx.Client) -> None:
    assert http.post(VALIDATE, json={"grader": SC}).json() == {"grader": SC}
    told = http.post(VALIDATE, json={"grader": JUDGE}).json()["grader"]
    assert told["range"] == [0.0, 1.0] and told["model"] == "tiny"


@pytest.mark.parametrize("path", [RUN, VALIDATE])
@pytest.mark.parametrize(
    ("grader", "status", "code", "param", "words"),
    [
        ({**SC, "type": "strng_check"}, 400, "invalid_value", "grader.type", "Did you mean 'string_check'?"),
        ({**SC, "input": "{{ itm.x }}"}, 400, "invalid_variable_error", "grader.input", "Did you mean 'item'?"),
        ({**SC, "refrence": 1}, 400, "invalid_value", "grader.refrence", "Did you mean 'reference'?"),
        ({**JUDGE, "model": "tinny"}, 404, "model_not_found", "model", "Did you mean 'tiny'?"),
        (
            {**JUDGE, "tunewright": {"endpoint": "https://example.com/v1"}}, 400, "endpoint_not_allowed",
            "grader.endpoint", "TUNEWRIGHT_ENDPOINTS",
        ),
        ("text", 400, "invalid_type", "grader", "object"),
        (None, 400, "invalid_type", "grader", "object"),
    ],
)  # fmt: skip
def test_graders_that_are_none(
    http: httpx.Client, path: str, grader: Any, status: int, code: str, param: str, words: str
) -> None:
    body = {"grader": grader, **({"model_sample": "x"} if path == RUN else {})}
    answer = http.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param), error
    assert words in error["message"]


def test_bodies_that_are_none(http: httpx.Client) -> None:
    for body, param in (
        ({"grader": SC}, "model_sample"),
        ({"model_sample": "x"}, "grader"),
        ({"grader": SC, "model_sample": 3}, "model_sample"),
        ({"grader": SC, "model_sample": "x", "itm": {}}, "itm"),
        ({"grader": SC, "model_sample": "x", "item": []}, "item"),
    ):
        answer = http.post(RUN, json=body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
