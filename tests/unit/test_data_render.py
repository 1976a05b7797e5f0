"""Rendering: the ids of apply_chat_template, the right tokens trained, nothing left out silently."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import _templates as kinds
import pytest

from tunewright.core.conversation import Conversation, Message
from tunewright.core.errors import DataError
from tunewright.core.example import Example, Group
from tunewright.data.formats import FORMATS
from tunewright.data.render import RenderReport, render_rows
from tunewright.data.tokenizer import Tokenizer
from tunewright.data.xray import xray

END = "<|im_end|>"


def conversation(messages: list[dict[str, Any]], line: int = 1, **more: Any) -> Conversation:
    return FORMATS.load("openai_chat").convert({"messages": messages, **more}, line)


def make(folder: Path, template: str) -> Tokenizer:
    return Tokenizer.load(folder, template=template)


def render(rows: list[Conversation], tokenizer: Tokenizer, **options: Any) -> tuple[list[Group], RenderReport]:
    report = RenderReport()
    groups = list(render_rows(rows, tokenizer, report=report, **{"max_length": 10_000, **options}))
    return groups, report


def trained_text(group: Group, tokenizer: Tokenizer, index: int = 0) -> list[str]:
    """The trained runs of an example, as text."""
    runs = itertools.groupby(xray(group, tokenizer, index), key=lambda row: row[1] > 0)
    return ["".join(text for text, _ in run) for on, run in runs if on]


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "Two é 你好 😀"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.mark.parametrize("name", [n for n in kinds.ALL if n not in ("syntax", "thinking")])
def test_ids_are_those_of_apply_chat_template(tiny_model_dir: Path, name: str) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer = make(tiny_model_dir, kinds.ALL[name])
    for chat in [*kinds.CHATS, TURNS]:
        groups, _ = render([conversation(chat)], tokenizer)
        ids = reference.apply_chat_template(chat, chat_template=kinds.ALL[name], tokenize=True, return_dict=False)
        assert [list(e.ids) for g in groups for e in g.examples] == [list(ids)]


@pytest.mark.parametrize("name", ["chatml", "default_system", "tools", "prompt_thinks"])
def test_assistant_turns_and_their_end_token_are_trained_and_nothing_else(tiny_model_dir: Path, name: str) -> None:
    tokenizer = make(tiny_model_dir, kinds.ALL[name])
    (group,), report = render([conversation(TURNS)], tokenizer)
    assert trained_text(group, tokenizer) == [f"Two é 你好 😀{END}", f"Yes.{END}"]
    assert report.end_of_turn == END and report.unended == 0 and report.notes == []
    assert set(group.examples[0].weights) == {0.0, 1.0}
    assert report.supervised_tokens == sum(group.examples[0].weights) and report.tokens == group.n_tokens
    assert "".join(text for text, _ in xray(group, tokenizer)) == tokenizer.render(TURNS)


def test_first_turn_by_the_assistant(tiny_model_dir: Path) -> None:
    chat = [{"role": "assistant", "content": "end"}, {"role": "user", "content": "Hi"}]
    for template in (kinds.CHATML, kinds.DEFAULT_SYSTEM):
        tokenizer = make(tiny_model_dir, template)
        (group,), _ = render([conversation(chat)], tokenizer)
        assert trained_text(group, tokenizer) == [f"end{END}"]


def test_weights_and_train_on_last(tiny_model_dir: Path) -> None:
    tokenizer = make(tiny_model_dir, kinds.CHATML)
    off = [*TURNS[:2], {**TURNS[2], "weight": 0}, *TURNS[3:]]
    (group,), _ = render([conversation(off)], tokenizer)
    assert trained_text(group, tokenizer) == [f"Yes.{END}"]
    off_last = [*TURNS[:4], {**TURNS[4], "weight": 0}]
    (group,), _ = render([conversation(off_last)], tokenizer)
    assert trained_text(group, tokenizer) == [f"Two é 你好 😀{END}"]
    (group,), _ = render([conversation(TURNS)], tokenizer, train_on="last")
    assert trained_text(group, tokenizer) == [f"Yes.{END}"]


def test_same_answer_twice_is_found_twice(tiny_model_dir: Path) -> None:
    tokenizer = make(tiny_model_dir, kinds.CHATML)
    chat = [{"role": "user", "content": "Yes."}, {"role": "assistant", "content": "Yes."}] * 3
    (group,), _ = render([conversation(chat)], tokenizer)
    assert trained_text(group, tokenizer) == [f"Yes.{END}"] * 3


def test_tool_calls_are_trained(tiny_model_dir: Path) -> None:
    for template, call in (
        (kinds.TOOLS, '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'),
        (kinds.TEXT_ARGUMENTS, 'weather {"city": "Köln"}'),
        (kinds.CALLS_FIRST, '<call>weather{"city": "Köln"}'),
    ):
        tokenizer = make(tiny_model_dir, template)
        tools = {"tools": [kinds.TOOL]} if template == kinds.TOOLS else {}
        (group,), _ = render([conversation(kinds.TOOL_CHAT, **tools)], tokenizer)
        assert trained_text(group, tokenizer) == [call + END, f"It has 9 degrees.{END}"]


def refusal(rows: list[Conversation], tokenizer: Tokenizer, **options: Any) -> DataError:
    with pytest.raises(DataError) as e:
        render(rows, tokenizer, **options)
    return e.value


def test_a_template_that_drops_tools_or_calls_is_found_out(tiny_model_dir: Path) -> None:
    tokenizer = make(tiny_model_dir, kinds.CHATML)
    good = conversation(TURNS)
    error = refusal([good, conversation(kinds.TOOL_CHAT, 2), conversation(TURNS, 3, tools=[kinds.TOOL])], tokenizer)
    assert "2 of 3 rows cannot be used" in error.message
    assert [(p.line, p.field, p.value) for p in error.problems] == [
        (2, "messages[1].tool_calls[0]", "weather"),
        (3, "tools[0]", "weather"),
    ]
    assert "leaves its tool call 'weather' out" in error.problems[0].message
    assert "leaves out the row's tools ('weather')" in error.problems[1].message


@pytest.mark.parametrize(
    ("template", "field"),
    [
        (
            kinds.CHATML.replace("m['content']", "(m['content'] if m['role'] != 'system' else '')"),
            "messages[0].content",
        ),
        (kinds.CHATML.replace("m['content']", "m['content'][:3]"), "messages[0].content"),
        (kinds.CHATML.replace("m['content']", "(m['content'] if loop.index != 3 else 'x')"), "messages[2].content"),
        (kinds.CHATML.replace("m['content']", "messages[1]['content']"), "messages[0].content"),
        ("{{ raise_exception('System role not supported') }}", "messages"),
    ],
)
def test_lost_content_is_found_out(tiny_model_dir: Path, template: str, field: str) -> None:
    error = refusal([conversation(TURNS, 7)], make(tiny_model_dir, template))
    assert [(p.line, p.field) for p in error.problems] == [(7, field)]


def test_control_tokens_in_content_are_refused(tiny_model_dir: Path) -> None:
    chat = [{"role": "user", "content": f"Hi{END}\n<|im_start|>system"}, {"role": "assistant", "content": "No"}]
    error = refusal([conversation(chat, 4)], make(tiny_model_dir, kinds.CHATML))
    assert f"message 1 (user) contains an invalid token: {END}." in error.problems[0].message
    assert (error.problems[0].field, error.code) == ("messages[0].content", "invalid_file_format")


def test_half_a_character_in_arguments_is_refused_with_its_line(tiny_model_dir: Path) -> None:
    chat = [dict(m) for m in kinds.TOOL_CHAT]
    function = {"name": "weather", "arguments": '{"city": "\\ud800"}'}
    chat[1] = {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": function}]}
    error = refusal([conversation(chat, 5)], make(tiny_model_dir, kinds.TOOLS))
    assert error.problems[0].line == 5 and "surrogate" in error.problems[0].message


def test_a_template_that_rewrites_earlier_turns_gives_one_example_a_turn(tiny_model_dir: Path) -> None:
    tokenizer = make(tiny_model_dir, kinds.THINKING)
    chat = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\nTwo"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes"},
    ]
    groups, report = render([conversation(chat, 3)], tokenizer)
    assert [trained_text(g, tokenizer) for g in groups] == [[chat[1]["content"] + END], [chat[3]["content"] + END]]
    assert [g.examples[0].ids for g in groups] == [
        tuple(tokenizer.encode(tokenizer.render(chat[:n]))[0]) for n in (2, 4)
    ]
    assert report.split_rows == 1 and report.examples == 2 and "one example for each trained turn" in report.notes[0]
    (only,), report = render([conversation(chat, 3)], tokenizer, train_on="last")
    assert only == groups[1] and report.split_rows == 0


def test_a_prompt_that_opens_a_thought(tiny_model_dir: Path) -> None:
    tokenizer = make(tiny_model_dir, kinds.PROMPT_THINKS)
    chat = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\nTwo"}]
    (group,), _ = render([conversation(chat)], tokenizer)
    assert trained_text(group, tokenizer) == [f"Easy.\n</think>\n\nTwo{END}"]
    assert list(group.examples[0].ids) == tokenizer.encode_chat(chat, add_generation_prompt=False)


def test_no_end_of_turn_token_is_said(tiny_model_dir: Path) -> None:
    tokenizer = make(tiny_model_dir, kinds.NO_END)
    (group,), report = render([conversation(TURNS)], tokenizer)
    assert trained_text(group, tokenizer) == ["Two é 你好 😀\n\n", "Yes.\n\n"]
    assert report.end_of_turn == "" and report.unended == 2
    assert "does not learn when to stop" in report.notes[0]


def test_an_end_token_that_does_not_stop_generation_is_said(tiny_model_dir: Path) -> None:
    tokenizer = make(tiny_model_dir, kinds.OTHER_END)
    (group,), report = render([conversation(TURNS)], tokenizer)
    assert trained_text(group, tokenizer)[-1] == "Yes.<|endoftext|>"
    assert report.end_of_turn == "<|endoftext|>" and "generation does not stop there" in report.notes[0]


def test_every_span_begins_and_ends_on_the_right_token(tiny_model_dir: Path) -> None:
    """Independently of the renderer: by the ids alone, a trained run follows the header and ends with the end token."""
    tokenizer = make(tiny_model_dir, kinds.CHATML)
    header = tokenizer.encode("<|im_start|>assistant\n")[0]
    (group,), _ = render([conversation(TURNS * 3)], tokenizer)
    ids, weights = group.examples[0].ids, group.examples[0].weights
    expected = [0.0] * len(ids)
    for at in range(len(ids)):
        if list(ids[at : at + len(header)]) == header:
            stop = ids.index(tokenizer.eos_id, at + len(header))
            expected[at + len(header) : stop + 1] = [1.0] * (stop + 1 - at - len(header))
    assert list(weights) == expected and sum(expected) > 0


def test_a_token_across_the_border_belongs_to_the_prompt(tiny_model_dir: Path) -> None:
    # the header ends in a word that is one token together with what the answer begins with
    template = kinds.CHATML.replace("assistant\\n", "assistant\\n").replace(
        "m['role'] + '\n' + m['content']", "m['role'] + '\n' + ('It i' if m.role == 'assistant' else '') + m['content']"
    )
    template = template.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\nIt i' }}")
    tokenizer = make(tiny_model_dir, template)
    chat = [{"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "s red."}]
    (group,), report = render([conversation(chat)], tokenizer)
    _, offsets = tokenizer.encode(tokenizer.render(chat))
    start = tokenizer.render(chat).index("s red.")
    assert report.straddling == int(start not in [a for a, _ in offsets])
    assert report.straddling == 1, "the tokenizer of the fixture is expected to have ' is' as one token"
    first = next(t for t, w in enumerate(group.examples[0].weights) if w)
    assert offsets[first][0] > start and offsets[first - 1][0] < start and "middle of a token" in report.notes[0]


def test_overlong_rows(tiny_model_dir: Path) -> None:
    tokenizer = make(tiny_model_dir, kinds.CHATML)
    long = [TURNS[1], {"role": "assistant", "content": "word " * 300}]
    far = [{"role": "user", "content": "word " * 250}, TURNS[2]]
    rows = [conversation(TURNS, 1), conversation(long, 2), conversation(far, 3)]
    error = refusal(rows, tokenizer, max_length=200)
    assert "2 of 3 rows are longer than the limit of 200 tokens; the longest has" in error.message
    assert "(line 2)" in error.message and "'truncate' or 'drop'" in error.message
    groups, report = render(rows, tokenizer, max_length=200, overlong="drop")
    assert [g.examples[0].source for g in groups] == [1] and report.dropped == report.overlong == 2
    groups, report = render(rows, tokenizer, max_length=200, overlong="truncate")
    assert [(g.examples[0].source, len(g.examples[0].ids)) for g in groups][1] == (2, 200)
    assert (len(groups), report.truncated, report.empty, report.overlong) == (2, 1, 1, 2)
    whole, _ = render(rows[1:2], tokenizer)
    assert whole[0].examples[0].ids[:200] == groups[1].examples[0].ids
    words = " ".join(report.notes)
    assert "cut at the end" in words and "nothing to learn from is left" in words


def test_plain_text(tiny_model_dir: Path) -> None:
    tokenizer = make(tiny_model_dir, "")
    (group,), report = render([Conversation(text="It is red. 你好", source=9)], tokenizer, shape="text")
    example = group.examples[0]
    assert example.ids == (*tokenizer.encode("It is red. 你好")[0], tokenizer.eos_id)
    assert example.weights == (0.0, *[1.0] * (len(example.ids) - 1)) and example.source == 9
    assert report.supervised_tokens == len(example.ids) - 1


def pair(chosen: str, rejected: str) -> Conversation:
    answers = [[Message(role="assistant", content=text)] for text in (chosen, rejected)]
    messages = [
        Message(role="user", content="Q?"),
        Message(role="assistant", content="A"),
        Message(role="user", content="R?"),
    ]
    return Conversation(messages=messages, preferred=answers[0], rejected=answers[1], source=2)


@pytest.mark.parametrize(("chosen", "rejected"), [("It is red.", "No."), ("It is red.", "It is blue."), ("a", "a b")])
def test_preference_pairs_share_their_prompt(tiny_model_dir: Path, chosen: str, rejected: str) -> None:
    tokenizer = make(tiny_model_dir, kinds.CHATML)
    (group,), report = render([pair(chosen, rejected)], tokenizer, shape="preference")
    prompt = tokenizer.encode_chat(
        [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A"}, {"role": "user", "content": "R?"}]
    )
    assert group.prefix == len(prompt) and all(list(e.ids[: group.prefix]) == prompt for e in group.examples)
    assert trained_text(group, tokenizer, 0) == [chosen + END] and trained_text(group, tokenizer, 1) == [rejected + END]
    assert report.examples == 2 and report.rows == 1


def test_wrong_shapes_are_refused(tiny_model_dir: Path) -> None:
    tokenizer = make(tiny_model_dir, kinds.CHATML)
    error = refusal([pair("a", "b")], tokenizer, shape="chat")
    assert "is a preference row, but the job needs chat rows" in error.message and error.problems[0].line == 2


def test_lost_content_of_an_answer_names_the_output(tiny_model_dir: Path) -> None:
    tokenizer = make(tiny_model_dir, kinds.CHATML.replace("m['content']", "(m['content'] if loop.index < 4 else '')"))
    error = refusal([pair("a", "b")], tokenizer, shape="preference")
    assert error.problems[0].field == "preferred_output[0].content"


def test_xray_shows_split_characters_whole(tiny_model_dir: Path) -> None:
    tokenizer = make(tiny_model_dir, "")
    ids, _ = tokenizer.encode("a😀é\ufffdb")
    rows = xray(Group((Example(tuple(ids), tuple([1.0] * len(ids))),)), tokenizer)
    assert "".join(text for text, _ in rows) == "a😀é\ufffdb" and "😀" in [text for text, _ in rows]
    assert len(rows) == len(ids)


def test_rendering_is_deterministic_and_lazy(tiny_model_dir: Path) -> None:
    tokenizer = make(tiny_model_dir, kinds.CHATML)
    endless = (conversation(TURNS, line) for line in itertools.count(1))
    first = list(itertools.islice(render_rows(endless, tokenizer, max_length=500), 5))
    again, _ = render([conversation(TURNS, line) for line in range(1, 6)], tokenizer)
    assert first == again
