"""check_file and raise_for: OpenAI's codes and words with our detail, every problem counted, nothing raised."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from _templates import TOOL, TOOL_CHAT
from hypothesis import given, settings
from hypothesis import strategies as st

from tunewright.core.errors import DataError, DataReport, SpecError
from tunewright.data.validate import check_file, raise_for, read_conversations

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
BAD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistent", "content": "Hello!"}]}
PAIR = {
    "input": {"messages": GOOD["messages"][:1]},
    "preferred_output": GOOD["messages"][1:],
    "non_preferred_output": [{"role": "assistant", "content": "What?"}],
}


def put(folder: Path, rows: list[Any], name: str = "support.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def failure(report: DataReport, what: str = "training") -> DataError:
    with pytest.raises(DataError) as e:
        raise_for(report, what)
    return e.value


def test_a_good_file(tmp_path: Path) -> None:
    report = check_file(put(tmp_path, [GOOD] * 12))
    assert (report.n_rows, report.n_problems, report.format, report.shape) == (12, 0, "openai_chat", "chat")
    assert "12 of the first 12 rows have 'messages'" in report.reason and "JSON Lines" in report.reason
    assert report.notes == []
    raise_for(report)


@pytest.mark.parametrize("n", [0, 1, 3, 9])
def test_too_few_rows_in_openais_words(tmp_path: Path, n: int) -> None:
    path = put(tmp_path, [GOOD] * n)
    error = failure(check_file(path))
    assert error.message.startswith(f"Training file has {n} example(s), but must have at least 10 examples")
    assert ("the file is empty" in error.message) == (n == 0)
    assert (error.code, error.param, error.status) == ("invalid_n_examples", "training_file", 400)
    error = failure(check_file(path), "validation")
    assert error.message.startswith(f"Validation file has {n} ") and error.param == "validation_file"
    assert check_file(path, min_examples=n).n_problems == 0


def test_a_bad_row_is_named_with_line_field_and_hint(tmp_path: Path) -> None:
    error = failure(check_file(put(tmp_path, [GOOD] * 213 + [BAD] + [GOOD] * 3)))
    assert error.message == (
        "The job failed due to an invalid training file. Invalid file format. Example 214, message 2 has role "
        "'assistent'. Did you mean 'assistant'? Use one of: system, developer, user, assistant, tool. "
        "(support.jsonl line 214, field messages[1].role)"
    )
    assert (error.code, error.param) == ("invalid_training_file", "training_file")
    assert [p.line for p in error.problems] == [214]


def test_validation_file_has_its_own_code(tmp_path: Path) -> None:
    error = failure(check_file(put(tmp_path, [BAD] + [GOOD] * 9), name="my.jsonl"), "validation")
    assert error.message.startswith("The job failed due to an invalid validation file.")
    assert (error.code, error.param) == ("invalid_validation_file", "validation_file")
    assert "(my.jsonl line 1," in error.message


def test_missing_and_extra_keys_are_format_errors(tmp_path: Path) -> None:
    error = failure(check_file(put(tmp_path, [GOOD] * 9 + [{"mesages": GOOD["messages"], "tools": []}])))
    assert error.message.startswith(
        "The job failed due to a file format error in the training file. Invalid file format. "
        "Example 10 contains an extra \"mesages\". Did you mean 'messages'?"
    )
    assert error.code == "invalid_file_format" and [p.field for p in error.problems] == ["mesages", "messages"]
    assert error.problems[1].message.startswith('is missing key "messages".')


def test_unparsable_line_in_openais_words(tmp_path: Path) -> None:
    error = failure(check_file(put(tmp_path, [GOOD] * 10 + ['{"a": 1 "b"}'])))
    assert (
        "Invalid file format. Example 11 cannot be parsed. Error: line contains invalid json: "
        "Expecting ',' delimiter: line 1 column 9 (char 8) (line 11)" in error.message
    )


def test_unknown_format(tmp_path: Path) -> None:
    report = check_file(put(tmp_path, [{"question": "a", "answer": "b"}] * 12))
    assert (report.n_rows, report.n_problems, report.format) == (12, 1, "")
    error = failure(report)
    assert "Unexpected file format, expected either prompt/completion pairs or chat messages." in error.message
    assert "rename 'question' to 'prompt'" in error.message and error.code == "invalid_training_file"


def test_at_most_100_problems_are_kept_and_all_are_counted(tmp_path: Path) -> None:
    report = check_file(put(tmp_path, [BAD] * 250))
    assert report.n_problems == 250 and [p.line for p in report.problems] == list(range(1, 101))
    assert "250 problems in all; next: line 2: message 2 has role" in failure(report).message
    assert len(check_file(put(tmp_path, [BAD] * 250), limit=7).problems) == 7


def test_wrong_shape_for_the_objective(tmp_path: Path) -> None:
    error = failure(check_file(put(tmp_path, [GOOD] * 12), purpose_shapes=["preference"]))
    assert error.message.startswith(
        "The job failed due to an invalid training file. Input file support.jsonl is in the fine-tune-chat format, but "
        "the specified fine-tuning job is not using 'supervised' as the training method (provided method=dpo)."
    )
    assert check_file(put(tmp_path, [PAIR] * 12), purpose_shapes=["preference"]).n_problems == 0
    assert "is not using 'dpo'" in failure(check_file(put(tmp_path, [PAIR] * 12), purpose_shapes=("chat",))).message


def test_shapes_may_not_mix(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "a"}]
    pair = {"conversations": turns, "chosen": "b", "rejected": "c"}
    chat = {"conversations": [*turns, {"from": "gpt", "value": "b"}]}
    report = check_file(put(tmp_path, [chat] * 10 + [pair]))
    assert report.n_problems == 1 and "is a preference row, but the rows before it are chat rows" in str(
        report.problems
    )


def test_the_job_may_say_the_format(tmp_path: Path) -> None:
    both = [{**GOOD, "text": "abc"}] * 10
    assert check_file(put(tmp_path, both), format="text").n_problems == 0
    with pytest.raises(SpecError, match="Did you mean 'alpaca'"):
        check_file(put(tmp_path, both), format="alpca")


def test_notes_say_what_is_probably_not_meant(tmp_path: Path) -> None:
    other = {**TOOL, "function": {**TOOL["function"], "name": "wether"}}
    rows = [{"messages": TOOL_CHAT, "tools": [other]}] * 3 + [
        {"messages": [*GOOD["messages"], GOOD["messages"][0]]}
    ] * 9
    notes = check_file(put(tmp_path, rows)).notes
    assert any("'weather' is called but is not among" in n and "(3 rows)" in n for n in notes)
    assert any("does not end with an assistant message" in n and "(9 rows)" in n for n in notes)
    report = check_file(put(tmp_path, [{"prompt": "a", "completion": "b", "id": 1}] * 10))
    assert report.notes == ["the fields 'id' are not used (10 rows)"]


def test_read_conversations(tmp_path: Path) -> None:
    rows = list(read_conversations(put(tmp_path, [GOOD, "", GOOD]), "openai_chat"))
    assert [c.source for c in rows] == [1, 3] and rows[0].messages[1].content == "Hello!"
    for bad, words in ((BAD, "line 3: message 2 has role"), ("{", "line 3: cannot be parsed")):
        with pytest.raises(DataError, match="support.jsonl " + words) as e:
            list(read_conversations(put(tmp_path, [GOOD, "", bad])))
        assert e.value.problems[0].line == 3
    with pytest.raises(DataError, match="Unexpected file format"):
        list(read_conversations(put(tmp_path, [{"x": 1}])))
    assert list(read_conversations(put(tmp_path, []))) == []


def test_missing_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"The file 'no.jsonl' cannot be opened: No such file or directory."):
        check_file(tmp_path / "no.jsonl")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(n: int) -> int:
        path = put(tmp_path, [{"prompt": "x" * 500, "completion": "y" * 500}, BAD, "{"] * n)
        check_file(path)
        tracemalloc.start()
        check_file(path)
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high

    assert peak(1500) < peak(150) + (1 << 20)


MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", "function", "x", None, 1]),
        "content": st.text(max_size=5) | st.none() | st.just([{"type": "text", "text": "a"}]) | st.just([{"type": 1}]),
        "weight": st.sampled_from([0, 1, 2, None, "1"]),
        "name": st.sampled_from(["f", "", None, 3]),
        "tool_calls": st.sampled_from([TOOL_CHAT[1]["tool_calls"], [], [{}], None, [{"function": {"name": 1}}], "x"]),
        "function_call": st.sampled_from([{"name": "f", "arguments": "{}"}, {}, None, "x"]),
        "tool_call_id": st.sampled_from(["call_1", "x", None, 4]),
    },
)
ROW = st.one_of(
    st.fixed_dictionaries(
        {"messages": st.lists(MESSAGE | st.integers(), max_size=4)},
        optional={"tools": st.sampled_from([[TOOL], [], None, [1], "x"]), "functions": st.just([TOOL["function"]])},
    ),
    st.dictionaries(
        st.sampled_from(
            ["input", "preferred_output", "non_preferred_output", "instruction", "output", "text", "prompt"]
        ),
        st.none() | st.text(max_size=3) | st.lists(MESSAGE, max_size=2),
        max_size=4,
    ),
    st.fixed_dictionaries(
        {
            "conversations": st.lists(
                st.fixed_dictionaries(
                    {
                        "from": st.sampled_from(["human", "gpt", "function_call", "observation", 3]),
                        "value": st.sampled_from(["x", "", '{"name": "f", "arguments": {}}', "[]", "[1]", None]),
                    }
                ),
                max_size=4,
            )
        }
    ),
)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(rows=st.lists(ROW | st.text(max_size=5), max_size=4))
@pytest.mark.slow
def test_fuzz_rows(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    path = put(tmp_path_factory.getbasetemp(), rows)
    n_lines = path.read_bytes().count(b"\n")
    report = check_file(path, min_examples=0)
    assert len(report.problems) == report.n_problems
    for p in report.problems:
        assert 1 <= p.line <= n_lines and p.message and "\n" not in p.message[:20]
    if report.n_problems:
        assert failure(report).message
    else:
        raise_for(report)
        assert len(list(read_conversations(path))) == report.n_rows
