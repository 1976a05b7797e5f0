"""From OpenAI's create request to our job spec, without a server."""

from __future__ import annotations

from typing import Any

import pytest

from tunewright.api import jobspec
from tunewright.api.errors import parse
from tunewright.api.requests import CreateCompletion, CreateJob
from tunewright.api.sampling import messages, sampling
from tunewright.core.errors import UserError
from tunewright.core.run import Artefact


def part(**options: Any) -> dict[str, Any]:
    return {
        "schema": {"type": "object", "additionalProperties": False, "properties": {k: {} for k in options}},
        "defaults": options,
        "card": {},
    }


DESCRIBE: dict[str, Any] = {
    "tuner": {"lora": part(r=16, alpha=32), "full": part()},
    "objective": {
        "sft": {**part(), "card": {"openai_method": "supervised"}},
        "dpo": {**part(beta=0.1), "card": {"openai_method": "dpo"}},
        "kto": {**part(), "card": {"openai_method": None}},
    },
    "optimizer": {"adamw": part()},
    "schedule": {"linear": part()},
}
LEAST = {"model": "tiny", "training_file": "file-a"}


def build(start: Artefact | None = None, **more: Any) -> tuple[Any, CreateJob]:
    request = parse(CreateJob, {**LEAST, **more})
    return jobspec.build_spec(request, DESCRIBE, start), request


def test_nothing_asked_is_supervised_with_auto_numbers() -> None:
    spec, request = build()
    assert spec.objective.name == "sft" and spec.n_epochs == spec.batch_size == "auto"
    method = jobspec.method_object(request, spec, DESCRIBE)
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    assert method == {"type": "supervised", "supervised": {"hyperparameters": auto}}


def test_method_wins_over_the_old_hyperparameters() -> None:
    new = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": None}}}
    spec, request = build(method=new, hyperparameters={"n_epochs": 5})
    assert spec.n_epochs == 2 and spec.batch_size == "auto"
    assert jobspec.shown_numbers(request)["n_epochs"] == 2
    spec, _ = build(method={"type": "supervised"}, hyperparameters={"n_epochs": 5})
    assert spec.n_epochs == 5


def test_a_method_is_the_objective_that_says_so() -> None:
    dpo = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "n_epochs": 1}}}
    spec, request = build(method=dpo)
    assert spec.objective.name == "dpo" and spec.objective.options == {"beta": 0.3} and spec.n_epochs == 1
    shown = jobspec.method_object(request, spec, DESCRIBE)
    assert shown is not None and shown["dpo"]["hyperparameters"]["beta"] == 0.3
    spec, _ = build(method={"type": "dpo"})
    assert spec.objective.options == {"beta": 0.1}


def test_an_objective_of_our_own_has_no_method() -> None:
    spec, request = build(tunewright={"objective": "kto"})
    assert spec.objective.name == "kto" and jobspec.method_object(request, spec, DESCRIBE) is None
    spec, request = build(tunewright={"objective": {"name": "dpo", "beta": 0.2}})
    assert jobspec.method_object(request, spec, DESCRIBE) == {
        "type": "dpo",
        "dpo": {"hyperparameters": jobspec.shown_numbers(request)},
    }


def test_method_and_objective_must_agree() -> None:
    with pytest.raises(UserError, match=r"'supervised' and tunewright.objective is 'kto'"):
        build(method={"type": "supervised"}, tunewright={"objective": "kto"})


def test_a_method_that_is_not_there() -> None:
    grader = {"type": "string_check"}
    with pytest.raises(UserError, match="'reinforcement' is not available") as e:
        build(method={"type": "reinforcement", "reinforcement": {"grader": grader}})
    assert e.value.param == "method.type" and "'supervised'" in e.value.message


SAME = {
    "type": "string_check", "name": "same", "operation": "eq",
    "input": "{{ sample.output_text }}", "reference": "{{ item.answer }}",
}  # fmt: skip
WITH_ROLLOUTS = {
    **DESCRIBE,
    "objective": {
        **DESCRIBE["objective"],
        "grpo": {
            **part(grader=None, group_size=8, eval_samples=1),
            "card": {"openai_method": "reinforcement", "needs_rollouts": True, "required": ["grader"]},
        },
    },
}


def reinforced(grader: Any = SAME, tunewright: Any = None, **hyper: Any) -> tuple[Any, CreateJob]:
    method = {"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": hyper}}
    request = parse(CreateJob, {**LEAST, "method": method, "tunewright": tunewright})
    return jobspec.build_spec(request, WITH_ROLLOUTS, None), request


def test_reinforcement_is_the_objective_over_rollouts() -> None:
    spec, request = reinforced(n_epochs=1, eval_interval=2, eval_samples=3, compute_multiplier=0.5)
    assert spec.objective.name == "grpo" and spec.format == "reinforcement"
    assert spec.objective.options == {"grader": SAME, "group_size": 4, "eval_samples": 3}
    assert spec.n_epochs == 1 and spec.eval_every == 2
    shown = jobspec.method_object(request, spec, WITH_ROLLOUTS)
    assert shown is not None and shown["reinforcement"]["grader"] == SAME
    assert shown["reinforcement"]["hyperparameters"]["eval_interval"] == 2
    spec, _ = reinforced(tunewright={"objective": {"group_size": 6, "name": "grpo"}})
    assert spec.objective.options == {"grader": SAME, "group_size": 6, "eval_samples": 1}
    assert spec.eval_every == "auto"


@pytest.mark.parametrize(
    "given, param",
    [
        ({"reasoning_effort": "low"}, "method.reinforcement.hyperparameters.reasoning_effort"),
        ({"grader": {**SAME, "type": "string_chek"}}, "method.reinforcement.grader.type"),
        ({"grader": {**SAME, "input": "{{ sampel.output_text }}"}}, "method.reinforcement.grader.input"),
        ({"eval_interval": 2, "tunewright": {"eval_every": 3}}, "tunewright.eval_every"),
    ],
)
def test_what_reinforcement_cannot_have_is_refused(given: dict[str, Any], param: str) -> None:
    with pytest.raises(UserError) as e:
        reinforced(**given)
    assert e.value.param == param


def test_a_child_goes_on_with_its_parents_adapter() -> None:
    parent = Artefact(kind="adapter", name="ft:x", base="tiny", tuner={"name": "lora", "r": 4, "alpha": 8}, step=1)
    assert build(parent)[0].tuner.options == {"r": 4, "alpha": 8}
    assert build(parent, tunewright={"tuner": {"name": "lora", "alpha": 2}})[0].tuner.options == {"r": 4, "alpha": 2}
    assert build(parent, tunewright={"tuner": "full"})[0].tuner.name == "full"
    assert build(parent.model_copy(update={"kind": "delta"}))[0].tuner.options == {"r": 4, "alpha": 8}
    whole = parent.model_copy(update={"kind": "weights"})
    assert build(whole)[0].tuner.options == {"r": 16, "alpha": 32}


def test_the_echo_has_what_was_sent_and_the_parts() -> None:
    spec, request = build(tunewright={"tuner": {"name": "lora", "r": 2}, "max_length": 64, "early_stopping": None})
    told = jobspec.echo(request, spec)
    assert told["tuner"] == {"name": "lora", "r": 2, "alpha": 32} and told["max_length"] == 64
    assert told.keys() == {"tuner", "objective", "optimizer", "schedule", "max_length", "early_stopping"}


def chat(**more: Any) -> CreateCompletion:
    return parse(CreateCompletion, {"model": "m", "messages": [{"role": "user", "content": "x"}], **more})


def test_what_was_not_asked_is_left_to_the_model() -> None:
    assert sampling(chat()) == {}


def test_what_was_asked_reaches_the_engine() -> None:
    more = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "n": 2, "stop": "a", "seed": -5, "max_tokens": 7}
    more |= {"presence_penalty": 0.1, "frequency_penalty": -0.1, "logit_bias": {"5": -100}}
    assert sampling(chat(**more)) == {**more, "stop": ["a"]}
    assert sampling(chat(max_completion_tokens=7)) == {"max_tokens": 7}
    assert sampling(chat(tunewright={"top_k": 4})) == {"top_k": 4}
    assert sampling(chat(logprobs=True)) == {"logprobs": 0}
    assert sampling(chat(logprobs=True, top_logprobs=3)) == {"logprobs": 3}
    assert sampling(chat(logprobs=False)) == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a"}}),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("store", True),
        ("reasoning_effort", "low"),
        ("modalities", ["audio"]),
        ("functions", [{"name": "f"}]),
        ("service_tier", "flex"),
        ("parallel_tool_calls", False),
    ],
)
def test_what_would_have_no_effect_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(UserError) as e:
        sampling(chat(**{field: value}))
    assert e.value.param == field and f"'{field}'" in e.value.message and e.value.status == 400


def test_messages_lose_what_means_nothing_to_a_model() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "1"},
    ]
    assert messages(chat(messages=asked)) == [
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "1"},
    ]


def test_images_are_refused_with_their_place() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    with pytest.raises(UserError, match="part 1 has type 'image_url'") as e:
        chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, image]}])
    assert e.value.param == "messages[0].content"
