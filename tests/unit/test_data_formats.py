"""Formats: what they convert to, what they refuse and in which words, and which one a file has."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from _templates import TOOL, TOOL_CHAT

from tunewright.core.conversation import Conversation, item_of
from tunewright.core.errors import DataError, Problem
from tunewright.data.formats import FORMATS
from tunewright.data.formats.detect import all_formats, decide

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
CALL = TOOL_CHAT[1]["tool_calls"][0]


def convert(name: str, row: dict[str, Any]) -> Conversation:
    return FORMATS.load(name).convert(copy.deepcopy(row), 214)


def chat(*messages: dict[str, Any], **more: Any) -> Conversation:
    return convert("openai_chat", {"messages": list(messages), **more})


def problems(name: str, row: dict[str, Any]) -> list[Problem]:
    with pytest.raises(DataError) as e:
        convert(name, row)
    assert all(p.line == 214 for p in e.value.problems)
    return e.value.problems


def problem(*messages: Any, **more: Any) -> Problem:
    found = problems("openai_chat", {"messages": list(messages), **more})
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_accepts_its_own_example(name: str) -> None:
    format = FORMATS.load(name)
    row = json.loads(format.example)
    assert format.name == name and format.fits(row)
    assert convert(name, row).source == 214
    assert (decide([row]).format is format) != format.asked


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("value", [None, 5, True, [], {}, "", [[]], {"role": "user"}, ["x"]])
def test_no_format_breaks_on_wrong_types(name: str, value: Any) -> None:
    format = FORMATS.load(name)
    example = json.loads(format.example)
    for key in example:
        for row in ({**example, key: value}, {k: v for k, v in example.items() if k != key}):
            try:
                assert isinstance(convert(name, row), Conversation)
            except DataError as e:
                assert e.problems and all(p.message and p.line == 214 for p in e.problems)


def test_chat_keeps_weights_names_tools_and_developer() -> None:
    row = chat(
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "ann"},
        {**ANSWER, "weight": 0},
        USER,
        {**ANSWER, "weight": 1, "refusal": None, "annotations": []},
        tools=[TOOL],
        parallel_tool_calls=False,
    )
    assert [m.role for m in row.messages] == ["developer", "user", "assistant", "user", "assistant"]
    assert [m.weight for m in row.messages] == [None, None, 0.0, None, 1.0]
    assert row.messages[1].content == "ab" and row.messages[1].name == "ann"
    assert row.tools == [TOOL] and row.parallel_tool_calls is False and row.shape == "chat" and row.source == 214


def test_tool_calls_pass_as_they_are() -> None:
    row = chat(*TOOL_CHAT, tools=[TOOL])
    call = row.messages[1].tool_calls
    assert call and call[0].function.arguments == '{"city": "Köln"}' and call[0].id == "call_1"
    assert row.messages[1].content is None and row.messages[2].tool_call_id == "call_1"


def test_older_functions_become_tools() -> None:
    row = chat(
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}},
        {"role": "function", "name": "weather", "content": "9"},
        ANSWER,
        functions=[TOOL["function"]],
    )
    assert row.tools == [TOOL]
    call = row.messages[1].tool_calls
    assert call and call[0].function.name == "weather"
    assert row.messages[2].role == "tool" and row.messages[2].tool_call_id == call[0].id


def test_the_design_words() -> None:
    found = problem(USER, ANSWER, {"role": "assistent", "content": "x"})
    assert str(found).startswith("line 214: message 3 has role 'assistent'.")
    assert "Did you mean 'assistant'?" in found.message
    assert "Use one of: system, developer, user, assistant, tool." in found.message
    assert (found.field, found.value) == ("messages[2].role", "assistent")
    assert found.allowed == "system, developer, user, assistant, tool"


def with_call(**changes: Any) -> dict[str, Any]:
    function = {**CALL["function"], **changes}
    return {"role": "assistant", "tool_calls": [{**CALL, "function": function}]}


@pytest.mark.parametrize(
    ("messages", "words", "field"),
    [
        ([USER, {"content": "x"}], "message 2 Discriminator 'role' is missing in value", "messages[1].role"),
        ([USER], "has no assistant message", "messages"),
        ([USER, {**ANSWER, "weight": 0}], "weight 0 on every assistant message", "messages"),
        ([{**USER, "weight": 1}, ANSWER], 'message 1 contains an extra "weight"', "messages[0].weight"),
        ([USER, {**ANSWER, "weight": 0.5}], "has weight 0.5. Use 0 or 1.", "messages[1].weight"),
        ([USER, {**ANSWER, "weight": True}], "has weight True. Use 0 or 1.", "messages[1].weight"),
        ([USER, {**ANSWER, "contnet": "x"}], "Did you mean 'content'?", "messages[1].contnet"),
        ([USER, {"role": "assistant"}], "neither content nor tool_calls", "messages[1].content"),
        ([USER, {"role": "assistant", "content": " "}], "neither content nor tool_calls", "messages[1].content"),
        ([USER, {**ANSWER, "content": 5}], "content of type number", "messages[1].content"),
        ([{"role": "user"}, ANSWER], 'missing key "content"', "messages[0].content"),
        (["x", ANSWER], "message 1 is of type text", "messages[0]"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}, ANSWER],
            "part of type 'image_url'. Only text can be trained",
            "messages[0].content[0]",
        ),
        ([USER, with_call(arguments={"a": 1})], "json.dumps", "messages[1].tool_calls[0].function.arguments"),
        ([USER, with_call(arguments="{a")], "not valid JSON", "messages[1].tool_calls[0].function.arguments"),
        ([USER, with_call(arguments="[]")], "JSON object", "messages[1].tool_calls[0].function.arguments"),
        (
            [USER, with_call(arguments='{"a":' * 90 + "1" + "}" * 90)],
            "too deeply",
            "messages[1].tool_calls[0].function.arguments",
        ),
        ([USER, with_call(name="")], "name", "messages[1].tool_calls[0].function.name"),
        ([USER, {"role": "assistant", "tool_calls": []}], "at least one call", "messages[1].tool_calls"),
        (
            [USER, with_call(), {"role": "tool", "content": "9", "tool_call_id": "call_2"}],
            "no earlier assistant message made. Did you mean 'call_1'?",
            "messages[2].tool_call_id",
        ),
        (
            [USER, {"role": "tool", "content": "9", "tool_call_id": "call_1"}, with_call()],
            "There is no earlier call",
            "messages[1].tool_call_id",
        ),
        (
            [USER, with_call(), {"role": "tool", "content": "9"}],
            'missing key "tool_call_id"',
            "messages[2].tool_call_id",
        ),
        ([USER, {**ANSWER, "refusal": "No."}], "refusal", "messages[1].refusal"),
        (
            [USER, ANSWER, {"role": "function", "name": "f", "content": "x"}],
            "no earlier message called",
            "messages[2].name",
        ),
    ],
)
def test_chat_refusals(messages: list[Any], words: str, field: str) -> None:
    found = problem(*messages)
    assert words in found.message, found.message
    assert found.field == field


def test_all_problems_of_a_row_at_once() -> None:
    row = {"messages": [{"role": "usr", "content": "x"}, {**ANSWER, "weight": 3}], "mesages": [], "tools": {}}
    found = problems("openai_chat", row)
    assert [p.field for p in found] == ["mesages", "messages[0].role", "messages[1].weight", "tools"]
    assert found[0].message.startswith("contains an extra \"mesages\". Did you mean 'messages'?")
    assert found[0].code == "invalid_file_format" and found[1].code == "invalid_training_file"


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ("x", "array of functions"),
        ([5], "is not"),
        ([{"type": "web", "function": {"name": "f"}}], "of type 'web'"),
        ([{"type": "function", "function": {}}], 'missing key "name"'),
        ([{"type": "function", "function": {"name": "f", "parameters": json.loads("[" * 80 + "]" * 80)}}], "deeper"),
    ],
)
def test_bad_tools(tools: Any, words: str) -> None:
    assert words in problem(USER, ANSWER, tools=tools).message


def test_alpaca() -> None:
    row = {"instruction": "Do", "input": "this", "output": "Done", "system": "S", "history": [["a", "b"]], "id": 7}
    got = [(m.role, m.content) for m in convert("alpaca", row).messages]
    assert got == [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "Do\n\nthis"), ("assistant", "Done")]
    assert convert("alpaca", {"instruction": "Do", "input": "", "output": "x"}).messages[0].content == "Do"
    assert [p.field for p in problems("alpaca", {"instruction": "", "output": 5})] == ["instruction", "output"]


def test_sharegpt_with_tools() -> None:
    function = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
    row = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '[{"name": "weather", "arguments": {"city": "Köln"}}, {"name": "f"}]'},
            {"from": "observation", "value": "9"},
            {"from": "observation", "value": "ok"},
            {"from": "gpt", "value": "9 degrees."},
        ],
        "tools": json.dumps([function]),
        "system": "S",
    }
    got = convert("sharegpt", row)
    assert [m.role for m in got.messages] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    calls = got.messages[2].tool_calls
    assert calls and [c.function.arguments for c in calls] == ['{"city": "Köln"}', "{}"]
    assert [m.tool_call_id for m in got.messages[3:5]] == [c.id for c in calls]
    assert got.tools == [{"type": "function", "function": function}]
    assert convert("sharegpt", {**row, "tools": [{"type": "function", "function": function}]}).tools == got.tools


def test_sharegpt_preference_and_refusals() -> None:
    turns = [{"from": "human", "value": "Q"}]
    row = {"conversations": turns, "chosen": {"from": "gpt", "value": "good"}, "rejected": "bad"}
    got = convert("sharegpt", row)
    assert got.shape == "preference" and got.preferred and got.rejected
    assert (got.preferred[0].content, got.rejected[0].content) == ("good", "bad")
    assert (
        "Did you mean 'human'" in problems("sharegpt", {"conversations": [{"from": "humann", "value": "x"}]})[0].message
    )
    assert (
        "before any function_call"
        in problems("sharegpt", {"conversations": [{"from": "tool", "value": "x"}]})[0].message
    )
    empty = {"conversations": [{"from": "function_call", "value": "[]"}]}
    assert "must hold a call" in problems("sharegpt", empty)[0].message
    assert "no assistant message" in problems("sharegpt", {"conversations": turns})[0].message


def test_prompt_completion_and_text() -> None:
    got = convert("prompt_completion", {"prompt": "a", "completion": " b"})
    assert [(m.role, m.content) for m in got.messages] == [("user", "a"), ("assistant", " b")]
    assert convert("text", {"text": "abc"}).shape == "text"
    assert problems("text", {"text": "  "})[0].message == "has an empty text."


def test_prompt_and_completion_as_messages_train_only_the_completion() -> None:
    row = {"prompt": [USER, ANSWER, {**USER, "content": "More?"}], "completion": [{**ANSWER, "content": "Yes."}]}
    got = convert("prompt_completion", row)
    assert [m.role for m in got.messages] == ["user", "assistant", "user", "assistant"]
    assert [m.weight for m in got.messages] == [None, 0, None, None]
    assert convert("prompt_completion", {**row, "completion": "Yes."}) == got
    bad = problems("prompt_completion", {"prompt": [{"role": "usr", "content": "x"}], "completion": []})
    assert [p.field for p in bad] == ["prompt[0].role", "completion"]
    assert "no assistant message" in problems("prompt_completion", {"prompt": "a", "completion": [USER]})[0].message


@pytest.mark.parametrize(
    "names", [("preferred_output", "non_preferred_output"), ("preferred_completion", "non_preferred_completion")]
)
def test_dpo_in_both_spellings(names: tuple[str, str]) -> None:
    row = {"input": {"messages": [USER], "tools": [TOOL]}, names[0]: [ANSWER], names[1]: [{**ANSWER, "content": "No"}]}
    got = convert("openai_dpo", row)
    assert got.shape == "preference" and got.tools == [TOOL] and got.preferred and got.rejected
    assert (got.preferred[0].content, got.rejected[0].content) == ("Hello!", "No")
    assert decide([row]).format is FORMATS.load("openai_dpo")


def test_dpo_refusals() -> None:
    good = json.loads(FORMATS.load("openai_dpo").example)
    assert problems("openai_dpo", {**good, "preferred_output": [ANSWER, ANSWER]})[0].field == "preferred_output"
    assert "exactly one assistant" in problems("openai_dpo", {**good, "non_preferred_output": [USER]})[0].message
    assert (
        problems("openai_dpo", {k: v for k, v in good.items() if k != "input"})[0].message == 'is missing key "input".'
    )
    assert (
        "belongs to the outputs" in problems("openai_dpo", {**good, "input": {"messages": [USER, ANSWER]}})[0].message
    )
    wrong = {**good, "input": {"messages": [{"role": "usr", "content": ""}]}, "extra": 1}
    assert [p.field for p in problems("openai_dpo", wrong)] == ["extra", "input.messages[0].role"]


def test_detection_says_why() -> None:
    decided = decide([["instruction", "input", "output", "text"]] * 9 + [["messages"]])
    assert decided.format is FORMATS.load("alpaca")
    assert "9 of the first 10 rows have 'instruction' + 'output'" in decided.reason


def test_ambiguous_and_unknown_fields() -> None:
    both = decide([["messages", "conversations"]])
    assert both.format is None and "openai_chat" in both.reason and "sharegpt" in both.reason
    unknown = decide([["question", "answer", "id"]])
    assert unknown.format is None
    assert unknown.reason.startswith(
        "Unexpected file format, expected either prompt/completion pairs or chat messages. "
        "The fields found are 'question', 'answer', 'id'. "
        "Nearest: prompt_completion (rename 'question' to 'prompt', 'answer' to 'completion')."
    )
    assert all(f.wants in unknown.reason for f in all_formats())
    assert "rename 'mesages' to 'messages'" in decide([["mesages"]]).reason
    assert "Nearest" not in decide([["zzz"]]).reason and decide([[]]).format is None


def test_what_graders_know_of_a_prompt() -> None:
    """The row's own fields and the prompt; an answer at its end is left out of the prompt and told as the reference."""
    row = convert("reinforcement", {"messages": [USER, ANSWER, USER, ANSWER], "answer": {"a": [1]}, "tools": None})
    assert row.shape == "prompt" and [m.role for m in row.messages] == ["user", "assistant", "user"]
    assert row.item == {"messages": [USER, ANSWER, USER], "answer": {"a": [1]}, "reference_answer": ANSWER["content"]}
    own = convert("reinforcement", {"messages": [USER, ANSWER], "reference_answer": "mine"})
    assert (own.item or {})["reference_answer"] == "mine"
    tools = {"messages": [USER], "tools": [], "answer": 1}
    for raw in ({"messages": [USER, ANSWER], "a": 1}, tools, {"prompt": [USER, ANSWER]}, {"prompt": "Hi"}):
        assert item_of(raw) == convert("reinforcement", raw).item, "`tunewright grade` and jobs know the same"
    text = convert("reinforcement", {"prompt": "Hi", "answer": 1})
    assert text.item == {"prompt": "Hi", "answer": 1} and text.messages[0].content == "Hi"
    (found,) = problems("reinforcement", {"messages": [ANSWER]})
    assert "has no message to answer" in found.message
