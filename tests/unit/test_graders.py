"""Templates, string_check, multi, judges. A bad spec is one clear error; a bad sample a grade that says why."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from teacher_kit import completion
from tunewright.core.errors import EndpointDown, SpecError, UserError
from tunewright.core.outbound import VARIABLE, Endpoint, Reply
from tunewright.graders import GRADERS
from tunewright.graders.base import ERRORS, Grade, Grader, Said, Sample, Seams, parse_grader
from tunewright.graders.formula import FUNCTIONS, parse_formula
from tunewright.graders.judging import models_here, read_result
from tunewright.graders.rows import missing_variables
from tunewright.graders.templates import parse_template

SC = {
    "type": "string_check",
    "name": "same",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.label }}",
    "operation": "eq",
}
TS = {**SC, "type": "text_similarity", "name": "near", "evaluation_metric": "fuzzy_match"}
del TS["operation"]
MULTI = {"type": "multi", "name": "both", "graders": {"a": SC, "b": TS}, "calculate_output": "0.25 * a + 0.5 * b"}
ASKED = [
    {"role": "developer", "content": "Be strict."},
    {"role": "user", "content": [{"type": "input_text", "text": "{{ item.q }}: {{ sample.output_text }}"}]},
]
SCORE = {"type": "score_model", "name": "judge", "model": "m", "input": ASKED}
LABEL = {**SCORE, "type": "label_model", "labels": ["good", "bad", "So-so"], "passing_labels": ["good", "So-so"]}
ITEM = {"q": "Name an animal", "label": "cat"}


def grade(spec: dict[str, Any], text: str, item: dict[str, Any] | None = None, **seams: Any) -> Grade:
    with parse_grader(spec, seams=Seams(**seams)) as grader:
        return grader.grade(ITEM if item is None else item, Sample(text))


def refused(spec: Any, fields: list[str] | None = None) -> SpecError:
    with pytest.raises(SpecError) as e:
        parse_grader(spec, fields, "method.reinforcement.grader")
    return e.value


# --- templates and string_check --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "text", "reference", "reward"),
    [
        ("eq", "cat", "cat", 1), ("eq", "Cat", "cat", 0), ("ne", "cat", "dog", 1), ("ne", "cat", "cat", 0),
        ("like", "a cat sat", "cat", 1), ("like", "a Cat sat", "cat", 0), ("like", "cat", "a cat", 0),
        ("ilike", "a CAT sat", "cat", 1), ("ilike", "STRASSE", "straße", 1), ("ilike", "dog", "cat", 0),
    ],
)  # fmt: skip
def test_string_check(operation: str, text: str, reference: str, reward: int) -> None:
    found = grade({**SC, "operation": operation}, text, {"label": reference})
    assert (found.reward, found.ok) == (reward, True)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("no variable", "no variable"),
        ("{{item.a.b}} and {{ item['a']['b'] }}", "deep and deep"),
        ("{{ item.list[1] }}{{item.list.0}}", "y1.5"),
        ('{{ item["two words"] }}', "w"),
        ("{{ item.a }}", '{"b": "deep"}'),
        ("{{ item.none }}{{ item.yes }}", "nulltrue"),
        ("{{ item.größe }}", "ß"),
        ("{{ sample.choices[0].message.content }}", '{"x": [1, 2]}'),
        ("{{ sample.output_json.x[1] }}", "2"),
        ("{ {{item.list[1]}} }", "{ y }"),
    ],
)
def test_templates(template: str, text: str) -> None:
    item = {"a": {"b": "deep"}, "list": [1.5, "y"], "two words": "w", "none": None, "yes": True, "größe": "ß"}
    scope = {"item": item, "sample": Sample('{"x": [1, 2]}').scope()}
    assert parse_template(template).render(scope) == text


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ itm.a }}", "Did you mean 'item'"),
        ("{{ sample.output_txt }}", "Did you mean 'output_text'"),
        ("{{ item.a b }}", "is no variable"),
        ("{{ item.a | upper }}", "Filters"),
        ("{{ }}", "is no variable"),
        ("{{ 3 }}", "is no variable"),
    ],
)
def test_templates_that_are_none(template: str, error: str) -> None:
    told = refused({**SC, "input": template})
    assert told.code == "invalid_variable_error" and told.param == "method.reinforcement.grader.input"
    assert error in told.message


def test_a_sample_or_row_without_the_variable_is_an_error_of_its_grade() -> None:
    missing = grade(SC, "cat", {"lable": "cat"})
    assert (missing.reward, missing.errors) == (0.0, {"invalid_variable_error": True})
    assert "Did you mean 'lable'" in missing.why
    json_spec = {**SC, "input": "{{ sample.output_json.animal }}"}
    assert grade(json_spec, '{"animal": "cat"}').reward == 1.0
    for text in ("no json", '{"animl": "cat"}', '["animal"]', "[" * 100_000):
        found = grade(json_spec, text)
        assert (found.reward, found.errors) == (0.0, {"sample_parse_error": True}), text


def test_a_field_that_no_row_has_is_told_before() -> None:
    for spec in (SC, MULTI):
        told = refused(spec, ["lable", "q"])
        assert told.code == "invalid_variable_error" and told.param == "method.reinforcement.grader"
        assert "{{ item.label }}" in told.message and "Did you mean 'lable'?" in told.message
        assert "Rows have: lable, q." in told.message
    assert "no fields" in refused(SC, []).message
    assert parse_grader(SC, ["label"]).fields == {"label"}


def test_rows_without_the_variable_are_found() -> None:
    grader = parse_grader({**SC, "reference": "{{ item.a[0].b }}{{ item.c }}"})
    rows = [(1, {"a": [{"b": 1}], "c": 2}), (2, {"a": [], "c": 2}), (5, {})]
    problems = list(missing_variables(grader, rows))
    assert [(p.line, p.field, p.code) for p in problems] == [
        (2, "a.0.b", "invalid_variable_error"), (5, "a.0.b", "invalid_variable_error"),
        (5, "c", "invalid_variable_error"),
    ]  # fmt: skip
    assert "{{ item.a[0].b }}" in problems[0].message


@pytest.mark.parametrize(
    ("spec", "param", "words"),
    [
        ([], "", "not list"),
        ({}, ".type", "is missing"),
        ({"type": "strng_check"}, ".type", "Did you mean 'string_check'"),
        ({"type": ["x"]}, ".type", "Use one of"),
        ({**SC, "refrence": "x"}, ".refrence", "Did you mean 'reference'"),
        ({**SC, "operation": "equal"}, ".operation", "'ilike'"),
        ({**SC, "input": 3}, ".input", "string"),
        ({k: v for k, v in SC.items() if k != "name"}, ".name", "missing"),
        ({**TS, "evaluation_metric": "cosine"}, ".evaluation_metric", "embeddings"),
        ({**TS, "evaluation_metric": "rouge"}, ".evaluation_metric", "'rouge_l'"),
        ({**SCORE, "range": [1, 0]}, ".range", "[0, 1]"),
        ({**SCORE, "range": [0, math.inf]}, ".range", "finite"),
        (SCORE, ".tunewright.endpoint", "has no endpoint"),
        ({**SCORE, "tunewright": {"endpoint": "http://evil"}}, ".endpoint", "not one that this machine may call"),
        ({**SCORE, "input": [{"role": "user", "content": [{"type": "input_image"}]}]}, ".input", "input_image"),
        ({**SCORE, "sampling_params": {"max_tokens": 3}}, ".sampling_params", "max_tokens"),
        ({**LABEL, "passing_labels": ["goood"]}, None, "Did you mean 'good'"),
        ({**MULTI, "calculate_output": "a + c"}, ".calculate_output", "there is no grader 'c'"),
        ({**MULTI, "graders": {"a": MULTI}}, ".graders.a", "is a multi"),
        ({**MULTI, "graders": {"a-b": SC}}, ".graders.a-b", "cannot be a grader's name"),
        ({**MULTI, "graders": {"min": SC}}, ".graders.min", "cannot be a grader's name"),
        ({**MULTI, "graders": SC}, ".graders", "dictionary"),
    ],
)
def test_bad_specs(spec: Any, param: str | None, words: str) -> None:
    told = refused(spec)
    assert words in told.message, told.message
    assert param is None or told.param == f"method.reinforcement.grader{param}"


def test_every_problem_is_told_at_once() -> None:
    wrong = {"a": {**SC, "input": "{{ x }}"}, "b": {"type": "strig_check"}}
    text = refused({**MULTI, "graders": wrong, "calculate_output": "a + d"}).message
    assert all(words in text for words in ("begins with 'x'", "'strig_check'", "no grader 'd'")), text


def test_the_spec_comes_back_normalised() -> None:
    for spec in (SC, TS, MULTI):
        assert parse_grader(spec).spec == spec
    full = parse_grader(SCORE, seams=Seams(ask=lambda messages, **more: Said(""))).spec
    assert full["range"] == [0.0, 1.0] and full["input"][1]["content"] == "{{ item.q }}: {{ sample.output_text }}"
    assert set(GRADERS) == {"string_check", "text_similarity", "multi", "python", "score_model", "label_model"}


# --- multi -----------------------------------------------------------------------------------------------------------


def test_multi() -> None:
    found = grade(MULTI, "cat")
    assert found.reward == 0.75 and found.sub_rewards == found.scores == {"a": 1.0, "b": 1.0}
    found = grade(MULTI, "cats")
    assert found.reward == pytest.approx(0.5 * 6 / 7) and found.sub_rewards["a"] == 0.0
    broken = grade({**MULTI, "graders": {"a": {**SC, "reference": "{{ item.none }}"}, "b": TS}}, "cat")
    assert (broken.reward, broken.errors) == (0.5, {"invalid_variable_error": True}) and broken.why.startswith("a: ")
    assert broken.sub_rewards == {"a": 0.0, "b": 1.0}


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("a + b * c", 2 + 3 * 0.5),
        ("(a + b) * c", 2.5),
        ("a ^ b", 8.0),
        ("2 ^ -1", 0.5),
        ("-a ^ 2", -4.0),  # as in Python and in mathematics
        ("2 ^ 3 ^ 2", 512.0),
        ("a / b - c", 2 / 3 - 0.5),
        ("min(a, b, c) + max(a, b)", 3.5),
        ("abs(c - a) + floor(c) + ceil(c)", 2.5),
        ("exp(log(a)) + sqrt(4)", 4.0),
        ("+a", 2.0),
        ("1e-3", 0.001),
    ],
)
def test_formulas(formula: str, value: float) -> None:
    assert parse_formula(formula, ["a", "b", "c"])({"a": 2.0, "b": 3.0, "c": 0.5}) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    "formula",
    [
        "", "a +", "((((", "a b", "a; b", "a.real", "a[0]", "[a]", "(a, b)", "'x'", "a < b", "a and b", "not a",
        "a if b else c",
        "lambda: 1", "(x := 1)", "__import__('os')", "().__class__", "f'{a}'", "min()", "abs(a, b)", "min(*a)",
        "max(a, key=b)", "eval(a)", "a // b", "a % b", "~a", "a | b", "1e999", "9" * 400, "1j", "True", "None",
        "-" * 200 + "a", "(" * 5000 + "a" + ")" * 5000, "a + " * 3000 + "a", "sqrt", "a\nb", "a # b\n c",
    ],
)  # fmt: skip
def test_formulas_that_are_none(formula: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_formula(formula, ["a", "b", "c"])


@pytest.mark.parametrize(
    "formula", ["1/(a-a)", "log(a-a)", "sqrt(-a)", "(-a)^0.5", "9^9^9^9", "exp(1e4)", "1e308*10*a"]
)
def test_a_formula_without_a_number_is_an_error_of_the_grade(formula: str) -> None:
    found = grade({**MULTI, "calculate_output": formula}, "cat")
    assert (found.reward, found.errors) == (0.0, {"formula_parse_error": True}) and formula in found.why
    assert found.sub_rewards == {"a": 1.0, "b": 1.0}


def test_openais_functions() -> None:
    assert set(FUNCTIONS) == {"min", "max", "abs", "floor", "ceil", "exp", "sqrt", "log"}


# --- judges ----------------------------------------------------------------------------------------------------------


class Judge:
    """`ask` of the seam. say: what it answers. seen: (messages, what else was sent)."""

    def __init__(self, say: Any) -> None:
        self.say, self.seen = say, []

    def __call__(self, messages: list[dict[str, Any]], **sent: Any) -> Said:
        self.seen.append((messages, sent))
        if isinstance(self.say, BaseException):
            raise self.say
        return self.say if isinstance(self.say, Said) else Said(self.say, {"total_tokens": 7})


STEPS = '{"steps": [{"description": "d", "conclusion": "it is fine"}], "result": %s}'


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (STEPS % "0.7", 0.7), ("```json\n" + STEPS % "0.7" + "\n```", 0.7), ("Yes: " + STEPS % "0.25" + " Done.", 0.25),
        ('{"result": 1}', 1.0), ("0.5", 0.5), (STEPS % "3", 1.0), (STEPS % "-1", 0.0),
        ('Like {"x": 1}: {"result": 0.5}', 0.5),
    ],
)  # fmt: skip
def test_score_model(text: str, reward: float) -> None:
    judge = Judge(text)
    found = grade({**SCORE, "sampling_params": {"temperature": 0.5, "max_completions_tokens": 9}}, "cat", ask=judge)
    assert (found.reward, found.errors, found.usage) == (reward, {}, {"m": {"total_tokens": 7}})
    ((messages, sent),) = judge.seen
    assert messages[0] == {"role": "developer", "content": "Be strict."}
    assert messages[1]["content"].startswith("Name an animal: cat\n\nAnswer with one JSON object")
    assert "a number from 0 to 1" in messages[1]["content"]
    assert sent == {"model": "m", "temperature": 0.5, "max_completion_tokens": 9}


def test_a_wider_range() -> None:
    spec = {**SCORE, "range": [-1, 5]}
    assert [grade(spec, "x", ask=Judge(t)).reward for t in ("4.5", "9", "-3")] == [4.5, 5.0, -1.0]
    assert grade(SCORE, "x", ask=Judge(STEPS % "1")).why == "it is fine"


@pytest.mark.parametrize(
    "text",
    ["", "I like it", '{"score": 1}', '{"result": "high"}', '{"result": true}', '{"result": null}', '{"result": NaN}',
     '{"result": Infinity}', "[0.5]", '{"result": 1', '{"result": ' * 200, "[" * 100_000, "null", "0.5 or so", '"0.5"'],
)  # fmt: skip
def test_garbage_of_a_judge(text: str) -> None:
    found = grade(SCORE, "cat", ask=Judge(text))
    assert (found.reward, found.errors) == (0.0, {"model_grader_parse_error": True}) and found.usage


def test_a_judge_that_refuses_or_fails() -> None:
    found = grade(SCORE, "cat", ask=Judge(Said("", {}, "I cannot say that")))
    assert found.errors == {"model_grader_refusal_error": True} and "I cannot say that" in found.why
    found = grade(SCORE, "cat", ask=Judge(UserError("too long")))
    assert found.errors == {"model_grader_server_error": True, "model_grader_server_error_details": "too long"}
    with pytest.raises(EndpointDown):
        grade(SCORE, "cat", ask=Judge(EndpointDown("away")))


@pytest.mark.parametrize(
    ("text", "reward"),
    [(STEPS % '"good"', 1.0), (STEPS % '"bad"', 0.0), ("Good.", 1.0), ('"so-so"', 1.0), (STEPS % '" GOOD "', 1.0)],
)
def test_label_model(text: str, reward: float) -> None:
    judge = Judge(text)
    found = grade(LABEL, "cat", ask=judge)
    assert (found.reward, found.errors) == (reward, {})
    assert 'one of "good", "bad", "So-so"' in judge.seen[0][0][1]["content"]


@pytest.mark.parametrize(
    "text", ["", "goodish", STEPS % '"great"', STEPS % "1", '{"result": ["good"]}', "good and bad"]
)
def test_labels_that_are_none(text: str) -> None:
    assert grade(LABEL, "cat", ask=Judge(text)).errors == {"model_grader_parse_error": True}


def test_labels_that_differ_in_case_only() -> None:
    spec = {**LABEL, "labels": ["Yes", "yes"], "passing_labels": ["yes"]}
    assert [grade(spec, "x", ask=Judge(t)).reward for t in ("yes", "Yes")] == [1.0, 0.0]


def test_the_result_in_an_answer() -> None:
    assert read_result("no") is None and read_result("3") == 3 and read_result('a {"result": {"x": 1}} b') == {"x": 1}


def test_judges_add_up_in_a_multi() -> None:
    spec = {**MULTI, "graders": {"a": SCORE, "b": {**LABEL, "model": "n"}, "c": SCORE}, "calculate_output": "a + b + c"}
    found = grade(spec, "cat", ask=Judge('{"result": 0.5}'))
    assert found.usage == {"m": {"total_tokens": 14}, "n": {"total_tokens": 7}}
    assert found.errors == {"model_grader_parse_error": True} and found.reward == 1.0
    assert models_here(parse_grader(spec, seams=Seams(ask=Judge(""))).spec) == ["m", "n", "m"]


class Server:
    """post() of an endpoint, as core/outbound.py has it."""

    def __init__(self, say: Callable[[int], tuple[int, Any]]) -> None:
        self.say, self.bodies, self.lock = say, [], threading.Lock()

    def __call__(self, endpoint: Endpoint, path: str, body: Any, timeout: float) -> Reply:
        with self.lock:
            self.bodies.append(body)
            n = len(self.bodies)
        return Reply(*self.say(n))


@pytest.fixture(autouse=True)
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "http://127.0.0.1:9/v1")


AWAY = {**SCORE, "tunewright": {"endpoint": "http://127.0.0.1:9/v1"}}


def test_an_endpoint_is_asked_once_for_the_same(tmp_path: Path) -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    server = Server(lambda n: (200, {**completion(STEPS % "0.5"), "usage": usage}))
    for _ in range(2):
        found = grade(AWAY, "cat", cache=tmp_path, post=server)
        assert (found.reward, found.usage) == (0.5, {"m": usage})
    (body,) = server.bodies
    assert body["model"] == "m" and body["messages"][1]["content"] == "Name an animal: cat"
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["steps", "result"] and schema["properties"]["result"]["type"] == "number"
    grade(AWAY, "dog", cache=tmp_path, post=server)
    plain = {**AWAY, "tunewright": {**AWAY["tunewright"], "structured": False}}
    grade(plain, "dog", cache=tmp_path, post=server)
    assert len(server.bodies) == 3 and "response_format" not in server.bodies[2]
    grade(AWAY, "cat", post=server)
    assert len(server.bodies) == 4  # no cache was given


def test_a_busy_endpoint_is_waited_for_and_a_dead_one_is_down() -> None:
    busy = Server(lambda n: (200, completion("1")) if n == 3 else (503, None))
    assert grade(AWAY, "cat", back_off=(0.0, 0.0), post=busy).reward == 1.0 and len(busy.bodies) == 3
    with pytest.raises(EndpointDown, match="tried 2 times"):
        grade(AWAY, "cat", back_off=(0.0,), post=Server(lambda n: (500, None)))
    for status in (401, 404):  # nothing will be graded before somebody mends it: the job pauses
        refusing = Server(lambda n, status=status: (status, {"error": {"message": "no such key"}}))
        with pytest.raises(EndpointDown, match="no such key"):
            grade(AWAY, "cat", post=refusing)


def test_an_endpoint_that_will_not_answer_this_one() -> None:
    found = grade(AWAY, "cat", post=Server(lambda n: (400, {"error": {"message": "too long"}})))
    assert found.errors["model_grader_server_error"] is True
    assert "too long" in str(found.errors["model_grader_server_error_details"])
    refusal = completion(None)
    refusal["choices"][0]["message"]["refusal"] = "I would rather not"
    assert grade(AWAY, "cat", post=Server(lambda n: (200, refusal))).errors == {"model_grader_refusal_error": True}
    for value in (completion("half", reason="length"), {"choices": []}, None, []):
        server = Server(lambda n, value=value: (200, value))
        assert grade(AWAY, "cat", post=server).errors == {"model_grader_parse_error": True}


def test_waiting_ends_when_it_is_halted() -> None:
    halt = threading.Event()
    halt.set()
    with pytest.raises(EndpointDown, match="not asked to the end"):
        grade(AWAY, "cat", halt=halt, post=Server(lambda n: (503, None)))


# --- the interface ---------------------------------------------------------------------------------------------------


def test_grades_come_from_many_threads() -> None:
    with parse_grader(MULTI) as grader, ThreadPoolExecutor(8) as pool:
        texts = [f"cat{i % 5}" for i in range(200)]
        alone = {text: grader.grade(ITEM, Sample(text)).reward for text in set(texts)}
        assert [g.reward for g in pool.map(lambda t: grader.grade(ITEM, Sample(t)), texts)] == [alone[t] for t in texts]


def test_errors_are_openais() -> None:
    assert len(ERRORS) == 14 and [k for k, v in ERRORS.items() if v is None] == [
        "python_grader_server_error_type", "python_grader_runtime_error_details", "model_grader_server_error_details",
    ]  # fmt: skip


def test_grading_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    grader: Grader = parse_grader(SC)
    ticks = iter([10.0, 12.5])
    monkeypatch.setattr("tunewright.graders.base.time.perf_counter", lambda: next(ticks))
    assert grader.grade(ITEM, Sample("cat")).seconds == 2.5
