"""Reading rows: kinds of files, encodings, damage. Nothing here may raise, and memory stays flat."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunewright.core.errors import DataError, Problem
from tunewright.data.lines import LINE_LIMIT
from tunewright.data.sources import read_rows, sniff

ROWS = [{"prompt": f"q {i} é你😀", "completion": 'a, "b"\nc'} for i in range(5)]


def put(folder: Path, data: bytes | str, name: str = "f.jsonl") -> Path:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def rows_of(path: Path) -> list:
    return [row for _, row in read_rows(path)]


def only_problem(path: Path) -> Problem:
    items = list(read_rows(path))
    assert len(items) == 1 and isinstance(items[0][1], Problem), items
    assert items[0][1].line >= 1
    return items[0][1]


def jsonl(rows: list, end: str = "\n") -> str:
    return end.join(json.dumps(r, ensure_ascii=False) for r in rows) + end


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", jsonl(ROWS).encode()),
        ("b.jsonl", b"\xef\xbb\xbf" + jsonl(ROWS, "\r\n").encode()),
        ("c.jsonl", ("\n\n" + jsonl(ROWS, "\n\n")).rstrip().encode()),
        ("d.json", json.dumps(ROWS, indent=2).encode()),
        ("e.jsonl", b"\xef\xbb\xbf \n" + json.dumps(ROWS, ensure_ascii=False).encode() + b"\n"),
        ("no-name-ending", json.dumps(ROWS).encode()),
    ],
)
def test_same_rows_from_every_way_to_write_json(tmp_path: Path, name: str, data: bytes) -> None:
    assert rows_of(put(tmp_path, data, name)) == ROWS


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    path = put(tmp_path, '\n{"a": 1}\n\n{"a": 2}\nx\n')
    assert [line for line, _ in read_rows(path)] == [2, 4, 5]


def test_csv_with_quotes_and_newlines(tmp_path: Path) -> None:
    text = "prompt,completion\r\n" + "".join(f'{r["prompt"]},"a, ""b""\nc"\r\n' for r in ROWS)
    assert rows_of(put(tmp_path, "\ufeff" + text, "f.csv")) == ROWS
    assert rows_of(put(tmp_path, text, "name-without-ending")) == ROWS
    assert rows_of(put(tmp_path, "prompt;completion\nx;y\n", "g.csv")) == [{"prompt": "x", "completion": "y"}]
    assert rows_of(put(tmp_path, "prompt\tcompletion\nx\ty\n", "g.tsv")) == [{"prompt": "x", "completion": "y"}]


def test_csv_cells_with_json(tmp_path: Path) -> None:
    import csv

    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    path = tmp_path / "f.csv"
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([["messages", "tools"], [json.dumps(messages), ""]])
    assert rows_of(path) == [{"messages": messages}]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,completion\na,b,c\n", "3 values"),
        ("prompt,prompt\na,b\n", "repeated column"),
        ('prompt,completion\n"a,b\n', "CSV"),
        ('messages\n"[1"\n', "invalid JSON"),
        ('messages\n"[""\\ud800""]"\n', "surrogate"),
        ('messages\n"[{""a"":1,""a"":2}]"\n', "twice"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, words: str) -> None:
    assert words in only_problem(put(tmp_path, text, "f.csv")).message


def test_parquet_drops_nulls_of_the_union_schema(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]},
        {"messages": [{"role": "user", "content": "c"}]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "f.parquet")
    assert rows_of(tmp_path / "f.parquet") == rows


def test_damaged_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "f.parquet")
    data = (tmp_path / "f.parquet").read_bytes()
    assert "Parquet" in only_problem(put(tmp_path, data[:-20], "g.parquet")).message
    assert "Parquet" in only_problem(put(tmp_path, b"PAR1" + bytes(50), "h.parquet")).message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_wide_text_is_refused_by_name(tmp_path: Path, encoding: str) -> None:
    text = only_problem(put(tmp_path, jsonl([{"prompt": "hello", "completion": "you"}] * 20).encode(encoding))).message
    assert encoding[:6].upper() in text and "iconv" in text


@pytest.mark.parametrize(
    ("head", "words"),
    [(b"\x1f\x8b\x08abc", "gunzip"), (b"PK\x03\x04abc", "Excel"), (b"%PDF-1.7", "PDF"), (bytes(range(32)) * 9, "NUL")],
)
def test_other_files_are_named(tmp_path: Path, head: bytes, words: str) -> None:
    assert words in only_problem(put(tmp_path, head)).message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"a": 1,}', "comma before the closing"),
        (b"{'a': 1}", "double quotes"),
        (b'{"a": "x', "cut off"),
        (b'{"a": 1} {"a": 2}', "line of its own"),
        (b'{"a": \xff}', "not UTF-8: byte 0xff at position 7"),
        (b'{"a": "x\x00y"}', "NUL"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1, "b": 2, "a": 3}', "key 'a' twice"),
        (b'{"a": {"b": 1, "b": 1}}', "key 'b' twice"),
        (b'{"a": ["x", {"b": "\\ud800"}]}', "surrogate"),
        (b'{"a": ' + b"[" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "cannot be parsed"),
        (b"{", "Each row must be on one line"),
    ],
)
def test_bad_lines_say_what_is_wrong_and_reading_goes_on(tmp_path: Path, line: bytes, words: str) -> None:
    alone = only_problem(put(tmp_path, line))
    assert alone.line == 1 and words in alone.message
    items = rows_of(put(tmp_path, b'{"ok": 1}\n' + line + b'\n{"ok": 2}\n'))
    assert items[0] == {"ok": 1} and isinstance(items[1], Problem) and items[1].line == 2 and items[2] == {"ok": 2}


def test_surrogate_problem_names_the_field_and_pairs_pass(tmp_path: Path) -> None:
    assert only_problem(put(tmp_path, '{"a": ["x", {"b": "\\udc00"}]}')).field == "a[1].b"
    assert rows_of(put(tmp_path, '{"a": "\\ud83d\\ude00"}')) == [{"a": "😀"}]


@pytest.mark.parametrize("value", ["[1, 2]", '"text"', "12", "null", "true"])
def test_a_line_that_is_no_dictionary_gets_openais_text(tmp_path: Path, value: str) -> None:
    items = rows_of(put(tmp_path, f'{{"ok": 1}}\n{value}\n'))
    assert items[1].message.startswith(
        "Expected file to have JSONL format, where every line is a valid JSON dictionary. "
        f'Line 2 is not a dictionary (HINT: line starts with: "{value[0]}'
    )
    first = rows_of(put(tmp_path, f"{value}\n{value}\n"))
    assert [p.line for p in first] == [1, 2] and "Line 1 is not a dictionary" in first[0].message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"a": 1}, {"a": 2', "cut off"),
        ('[{"a": 1}', "cut off"),
        ('[{"a": 1} {"a": 2}]', "must be followed by ','"),
        ('[{"a": 1}, ]', "cannot be parsed"),
        ('[{"a": 1}] x', "more text after"),
        ('[{"a": 1}, 5]', "not a dictionary"),
        ('[{"a": 1}, {"a": 1, "a": 2}]', "twice"),
    ],
)
def test_bad_arrays(tmp_path: Path, text: str, words: str) -> None:
    items = rows_of(put(tmp_path, text, "f.json"))
    assert items[0] == {"a": 1} and isinstance(items[-1], Problem) and words in items[-1].message


def test_an_array_longer_than_the_window(tmp_path: Path) -> None:
    rows = [{"text": "é" * (n * 37_000 % 1_500_000), "n": n} for n in range(12)]
    assert rows_of(put(tmp_path, json.dumps(rows, ensure_ascii=False), "f.json")) == rows


def test_an_array_element_over_the_limit(tmp_path: Path) -> None:
    path = put(tmp_path, '[{"a": 1}, {"a": "' + "x" * (LINE_LIMIT * 2) + '"}]', "f.json")
    items = rows_of(path)
    assert items[0] == {"a": 1} and "longer than 16 MiB" in items[1].message and len(items) == 2


def test_a_huge_line_is_refused_and_the_next_is_read(tmp_path: Path) -> None:
    path = put(tmp_path, b'{"a": "' + b"x" * LINE_LIMIT + b'"}\n{"a": 2}\n')
    items = rows_of(path)
    assert "longer than 16 MiB" in items[0].message and items[1] == {"a": 2}


@pytest.mark.slow
def test_a_line_of_one_gigabyte_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    with open(path, "wb") as f:
        f.seek(1 << 30)
        f.write(b'"}\n{"text": "x"}\n')
    code = (
        "import sys, pathlib; from tunewright.data.validate import check_file; "
        "r = check_file(pathlib.Path(sys.argv[1]), min_examples=1); print(r.n_rows, r.problems[0].message)"
    )
    limit = 1 << 30  # address space: a line held in memory would not fit beside the interpreter

    def confine() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    # zero bytes of a sparse file look binary; a leading text block makes it one long text line
    with open(path, "r+b") as f:
        f.write(b'{"text": "' + b"x" * (1 << 17))
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, preexec_fn=confine, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "longer than 16 MiB" in done.stdout


def test_empty_and_missing_files(tmp_path: Path) -> None:
    assert rows_of(put(tmp_path, b"")) == []
    assert rows_of(put(tmp_path, b"\n \n")) == []
    for path in (tmp_path / "nothing.jsonl", tmp_path):
        with pytest.raises(DataError, match="cannot be opened") as e:
            list(read_rows(path))
        assert str(tmp_path.parent) not in e.value.message


def test_text_files_are_one_row_a_line(tmp_path: Path) -> None:
    path = put(tmp_path, "First line.\n\nSecond.\r\n", "f.txt")
    assert list(read_rows(path)) == [(1, {"text": "First line."}), (3, {"text": "Second."})]


def test_the_name_of_the_user_counts_not_that_of_the_store(tmp_path: Path) -> None:
    path = put(tmp_path, "some,thing\na,b\n", "0123abcd")
    assert sniff(path) == "jsonl" and sniff(path, "data.csv") == "csv"


TEXTS = st.text(max_size=8)
VALUES = st.recursive(st.none() | TEXTS | st.integers(), lambda inner: st.lists(inner, max_size=3), max_leaves=5)
NAMES = st.sampled_from(["f.jsonl", "f.json", "f.csv", "f.txt", "f"])
PIECES = st.sampled_from(
    [p.encode() for p in ("{", "}", "[", "]", '"', ",", ":", "\n", "\\", "\\u", "\\ud800", "messages", "role", "1e999")]
)
WORDS = st.sampled_from(
    [
        b"NaN",
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
        b'{"messages": []}',
        b'{"text": "a"}',
        b"'",
        b"\r",
        b" ",
        b"prompt,text",
    ]
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.one_of(st.binary(max_size=300), st.lists(PIECES | WORDS, max_size=40).map(b"".join)), name=NAMES)
@pytest.mark.slow
def test_fuzz_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str) -> None:
    path = put(tmp_path_factory.getbasetemp(), data, name)
    last = 0
    for line, row in read_rows(path):
        assert line >= max(1, last)
        last = line
        if isinstance(row, Problem):
            assert row.line == line and row.message
        else:
            json.dumps(row, ensure_ascii=False).encode()


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(rows=st.lists(st.dictionaries(st.text(max_size=8), VALUES, max_size=3), max_size=4))
def test_fuzz_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[dict]) -> None:
    folder = tmp_path_factory.getbasetemp()
    assert rows_of(put(folder, "".join(json.dumps(r) + "\n" for r in rows))) == rows
    assert rows_of(put(folder, json.dumps(rows), "f.json")) == rows
