"""Rows out of a file, one at a time: JSON Lines, a JSON array, CSV, Parquet, plain text lines.

Memory stays flat whatever the file holds: a line or element has at most LINE_LIMIT bytes. What cannot be read becomes a
Problem in place of the row, so that one pass finds everything.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tunewright.core.errors import DataError, Problem

LINE_LIMIT = 16 << 20
BLOCK = 1 << 20
HEAD = 1 << 16
BAD_FORMAT = "invalid_file_format"
KINDS = {
    "jsonl": "JSON Lines",
    "json": "a JSON array",
    "csv": "CSV",
    "parquet": "Parquet",
    "txt": "plain text, one row a line",
}
# What the first bytes of files look like that are often uploaded by mistake.
MAGIC = {
    b"\x1f\x8b": "gzip (unpack it with `gunzip` first)",
    b"PK\x03\x04": "a ZIP or Excel file (unpack it, or export the sheet as CSV)",
    b"BZh": "bzip2 (unpack it first)",
    b"\xfd7zXZ": "xz (unpack it first)",
    b"\x28\xb5\x2f\xfd": "zstd (unpack it first)",
    b"%PDF": "a PDF",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"SQLite format 3": "a SQLite database",
    b"GGUF": "a GGUF model",
    b"ARROW1": "an Arrow file (save it as Parquet)",
}
UTF_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Columns that hold JSON text when a nested row is squeezed into a CSV cell.
JSON_COLUMNS = {
    "messages",
    "conversations",
    "tools",
    "functions",
    "history",
    "chosen",
    "rejected",
    "preferred_output",
    "non_preferred_output",
    "preferred_completion",
    "non_preferred_completion",
}
HEADERS = JSON_COLUMNS | {"instruction", "input", "output", "prompt", "completion", "text", "system"}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Row = dict[str, Any]


def read_rows(path: Path, name: str = "") -> Iterator[tuple[int, Row | Problem]]:
    """Every row with its 1-based line (JSON Lines), element (JSON array) or row number (CSV, Parquet).

    name: the file's name as the user knows it; its ending helps to tell CSV from text. Blank lines are skipped.
    Raises DataError if the file cannot be opened at all.
    """
    kind = sniff(path, name)
    if isinstance(kind, Problem):
        yield kind.line, kind
    elif kind == "parquet":
        yield from _read_parquet(path)
    else:
        with _open(path) as f:
            yield from {"jsonl": _read_jsonl, "json": _read_array, "csv": _read_csv, "txt": _read_text}[kind](f)


def sniff(path: Path, name: str = "") -> str | Problem:
    """Which of KINDS a file is, from its first bytes, then from its name; or why it is none of them."""
    with _open(path) as f:
        head = f.read(HEAD)
    if head.startswith(b"PAR1"):
        return "parquet"
    for mark, what in UTF_MARKS.items():
        if head.startswith(mark):
            return _wide(what)
    for mark, what in MAGIC.items():
        if head.startswith(mark):
            return _refuse(1, f"cannot be read: the file is {what}, not JSON Lines, JSON, CSV or Parquet.")
    if head[:4096].count(0) > 8:  # a few may be damage within one line, which is then named
        return _binary(head[:4096])
    return _text_kind(head.removeprefix(codecs.BOM_UTF8), Path(name or path.name).suffix.lower())


def _text_kind(head: bytes, suffix: str) -> str:
    body = head.lstrip()
    if body.startswith(b"["):
        return "jsonl" if _array_ends_on_line_one(body) else "json"
    if body.startswith(b"{"):
        return "jsonl"
    if suffix in (".csv", ".tsv"):
        return "csv"
    if suffix == ".txt":
        return "txt"
    names = {w.strip(b" \"'\r").decode("utf-8", "replace").lower() for w in re.split(rb"[,;\t]", body.split(b"\n")[0])}
    return "csv" if suffix not in (".jsonl", ".json") and names & HEADERS else "jsonl"


def _array_ends_on_line_one(body: bytes) -> bool:
    """Whether the first line is a whole JSON list and more follows: then the lines are rows, and wrong ones."""
    line, newline, rest = body.partition(b"\n")
    if not newline or not rest.strip():
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _binary(head: bytes) -> Problem:
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if max(even, odd) * 3 > len(head) // 2 and min(even, odd) * 10 < max(even, odd):
        return _wide("UTF-16")
    return _refuse(1, "cannot be read: it holds NUL bytes, so the file is damaged or is not text.")


def _wide(what: str) -> Problem:
    return _refuse(
        1, f"cannot be read: the file is {what} text. Save it as UTF-8 (`iconv -f {what} -t UTF-8 old > new`)."
    )


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb", buffering=BLOCK)
    except OSError as e:
        raise DataError(f"The file '{path.name}' cannot be opened: {e.strerror}.") from e


def _refuse(line: int, message: str, field: str = "", value: str = "") -> Problem:
    return Problem(line, message, field, value, code=BAD_FORMAT)


def _lines(f: BinaryIO) -> Iterator[tuple[int, bytes | Problem]]:
    """Numbered lines with their newline; a line over the limit is skipped without ever being held."""
    number = 0
    while line := f.readline(LINE_LIMIT + 1):
        number += 1
        if len(line) <= LINE_LIMIT or line.endswith(b"\n"):
            yield number, line.removeprefix(codecs.BOM_UTF8)
            continue
        del line
        while (rest := f.readline(BLOCK)) and not rest.endswith(b"\n"):
            pass
        yield (
            number,
            _refuse(
                number,
                f"is longer than {LINE_LIMIT >> 20} MiB, the limit for one row. Is every row on a line of its own?",
            ),
        )


def _decode(raw: bytes, number: int) -> str | Problem:
    if b"\x00" in raw:
        return _refuse(number, "holds NUL bytes: the file is damaged or was cut off by a crash.")
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        return _refuse(
            number,
            f"is not UTF-8: byte 0x{raw[e.start]:02x} at position {e.start + 1}. Save the file as UTF-8.",
            value=raw[max(0, e.start - 20) : e.start + 20].decode("latin-1"),
        )


class _Parser:
    """A JSON decoder that also notices duplicate keys and NaN; one for each file that is read."""

    def __init__(self) -> None:
        self.flaws: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._pairs, parse_constant=self._constant)

    def _pairs(self, pairs: list[tuple[str, Any]]) -> Row:
        row = dict(pairs)
        if len(row) != len(pairs):
            keys = [k for k, _ in pairs]
            twice = next(k for k in keys if keys.count(k) > 1)
            self.flaws.append(f"has the key '{twice[:80]}' twice in one object; keep one of them.")
        return row

    def _constant(self, word: str) -> None:
        self.flaws.append(f"holds {word}, which is not JSON; use a number, null or text.")

    def value(self, text: str, at: int) -> tuple[Any, int]:
        """The value that begins at `at`, and where it ends. Raises ValueError or RecursionError."""
        self.flaws.clear()
        return self._decoder.raw_decode(text, at)

    def line(self, text: str) -> Any:
        """The one value that a line holds."""
        self.flaws.clear()
        return self._decoder.decode(text)

    def check(self, value: Any, number: int, source: str) -> Row | Problem:
        """The value as a row, or what is wrong with it. source: the text it was read from."""
        if not isinstance(value, dict):
            start = source.lstrip()[:12]
            return _refuse(
                number,
                "Expected file to have JSONL format, where every line is a valid JSON dictionary. "
                f'Line {number} is not a dictionary (HINT: line starts with: "{start}...").',
                value=start,
            )
        if self.flaws:
            return _refuse(number, self.flaws[0])
        if _SURROGATE.search(source):
            where = next(_broken_text(value), None)
            if where is not None:
                return _refuse(
                    number, "holds half of a surrogate pair (\\ud800 to \\udfff alone), no character.", where
                )
        return value


def _broken_text(value: Any, path: str = "") -> Iterator[str]:
    """Paths of the texts that cannot be written as UTF-8."""
    if isinstance(value, str):
        if any("\ud800" <= c <= "\udfff" for c in value):
            yield path
    elif isinstance(value, dict):
        for k, v in value.items():
            yield from _broken_text(k, path or "(a key)")
            yield from _broken_text(v, f"{path}.{k}" if path else k)
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from _broken_text(v, f"{path}[{i}]")


def _read_jsonl(f: BinaryIO) -> Iterator[tuple[int, Row | Problem]]:
    parser = _Parser()
    for number, raw in _lines(f):
        if isinstance(raw, bytes) and not raw.strip():
            continue
        text = raw if isinstance(raw, Problem) else _decode(raw, number)
        yield number, text if isinstance(text, Problem) else _parse_line(parser, text, number)


def _parse_line(parser: _Parser, text: str, number: int) -> Row | Problem:
    try:
        return parser.check(parser.line(text), number, text)
    except json.JSONDecodeError as e:
        return _refuse(
            number,
            f"cannot be parsed. Error: line contains invalid json: {e} (line {number}).{_json_hint(text, e)}",
            value=text[max(0, e.pos - 20) : e.pos + 20].strip(),
        )
    except RecursionError:
        return _refuse(number, "is nested too deeply.")
    except ValueError as e:
        return _refuse(number, f"cannot be parsed: {e}.")


def _json_hint(text: str, e: json.JSONDecodeError) -> str:
    """The likely cause of a JSON error, as one more sentence."""
    body = text.strip()
    at = text[e.pos : e.pos + 1]
    hints = (
        (body in ("{", "["), "Each row must be on one line, or the whole file one JSON array."),
        (_cut_off(text, e) and not text.endswith("\n"), "The file ends in the middle of this row: it was cut off."),
        (at == "'" or body.startswith("{'"), "JSON wants double quotes; write rows with json.dumps."),
        (at in ("}", "]") and text[: e.pos].rstrip().endswith(","), "Remove the comma before the closing bracket."),
        (at in ("\u201c", "\u201d"), "Typographic quotes are not JSON quotes."),
        (e.msg == "Extra data", "Each row must be on a line of its own."),
    )
    return next((" " + hint for found, hint in hints if found), "")


def _cut_off(text: str, e: json.JSONDecodeError) -> bool:
    return e.msg.startswith("Unterminated string") or e.pos >= len(text.rstrip()) - 1


class _Window:
    """The part of a text file being parsed: it grows at the end and forgets what was consumed."""

    def __init__(self, f: BinaryIO) -> None:
        self._f = f
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.ended = "", 0, False

    def more(self) -> bool:
        """Read on; False at the end of the file. Raises UnicodeDecodeError."""
        if self.ended:
            return False
        # reading as much again as is held keeps repeated parsing of one long element linear
        block = self._f.read(max(BLOCK, len(self.text) - self.at))
        self.ended = not block
        self.text, self.at = self.text[self.at :] + self._decoder.decode(block, final=self.ended), 0
        return True

    def peek(self) -> str:
        """The next character that is not white space, or '' at the end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n":
                    return self.text[self.at]
                self.at += 1
            if not self.more():
                return ""

    def value(self, parser: _Parser) -> Any:
        """Parse the value that begins here. Raises ValueError (with one word for 'too long'), RecursionError."""
        while True:
            try:
                value, end = parser.value(self.text, self.at)
            except json.JSONDecodeError as e:
                unfinished = e.msg.startswith("Unterminated string") or e.pos >= len(self.text) - 16
                if unfinished and len(self.text) - self.at > LINE_LIMIT:
                    raise ValueError(f"it is longer than {LINE_LIMIT >> 20} MiB, the limit for one row") from e
                if unfinished and self.more():
                    continue
                raise
            if end == len(self.text) and self.more():
                continue
            self.source, self.at = self.text[self.at : end], end
            return value


def _read_array(f: BinaryIO) -> Iterator[tuple[int, Row | Problem]]:
    """Elements of one JSON array. After a syntax error nothing more can be read, so the last item says that."""
    window, parser, number = _Window(f), _Parser(), 0
    try:
        window.peek()
        window.at += 1
        while window.peek() != "]" or number:
            number += 1
            value = window.value(parser)
            yield number, parser.check(value, number, window.source)
            mark = window.peek()
            if mark == "]":
                break
            if mark != ",":
                what = f"'{mark}'" if mark else "the end of the file (it was cut off)"
                yield number, _refuse(number, f"must be followed by ',' or ']', not by {what}. Reading stopped here.")
                return
            window.at += 1
        window.at += 1
        if window.peek():
            yield (
                max(number, 1),
                _refuse(max(number, 1), "is followed by more text after the closing ']' of the array."),
            )
    except UnicodeDecodeError as e:
        yield number + 1, _refuse(number + 1, f"is not UTF-8 (byte 0x{e.object[e.start]:02x}). Save the file as UTF-8.")
    except RecursionError:
        yield number, _refuse(number, "is nested too deeply. Reading stopped here.")
    except ValueError as e:
        cut = " The file ends in the middle of this element: it was cut off." if window.ended else ""
        text = getattr(e, "msg", str(e))
        yield number, _refuse(number, f"cannot be parsed: {text}.{cut} Reading stopped here.")


class _Stop(Exception):
    """Ends the reading of a CSV file with one problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def _text_lines(f: BinaryIO) -> Iterator[str]:
    for number, raw in _lines(f):
        text = raw if isinstance(raw, Problem) else _decode(raw, number)
        if isinstance(text, Problem):
            raise _Stop(text)
        yield text


def _read_csv(f: BinaryIO) -> Iterator[tuple[int, Row | Problem]]:
    number = 0
    try:
        lines = _text_lines(f)
        first = next(lines, "")
        delimiter = max(",;\t", key=first.count)
        csv.field_size_limit(LINE_LIMIT)  # process-wide in the standard library; its default of 128 KiB is too small
        header = [h.strip() for h in next(csv.reader([first], delimiter=delimiter), [])]
        if len(set(header)) != len(header) or "" in header:
            raise _Stop(_refuse(1, f"has a header with an empty or repeated column name: {', '.join(header)[:200]}."))
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            number += 1
            try:
                values = next(reader)
            except csv.Error as e:
                yield number, _refuse(number, f"cannot be parsed as CSV: {e}.")
                continue
            if values:
                yield number, _csv_row(header, values, number)
            else:
                number -= 1
    except StopIteration:
        return
    except _Stop as stop:
        yield max(number, 1), stop.problem


def _csv_row(header: list[str], values: list[str], number: int) -> Row | Problem:
    if len(values) != len(header):
        return _refuse(
            number, f"has {len(values)} values, but the header names {len(header)} columns: {', '.join(header)[:200]}."
        )
    nested = JSON_COLUMNS | ({"input"} if {"preferred_output", "preferred_completion"} & set(header) else set())
    row: Row = {}
    for column, cell in zip(header, values, strict=True):
        if column not in nested or cell.lstrip()[:1] not in ("[", "{"):
            if cell or column not in nested:
                row[column] = cell
            continue
        try:
            row[column] = json.loads(cell)
        except (ValueError, RecursionError) as e:
            return _refuse(number, f"column '{column}' holds invalid JSON: {str(e)[:200]}.", column, cell[:80])
    return row


def _read_text(f: BinaryIO) -> Iterator[tuple[int, Row | Problem]]:
    for number, raw in _lines(f):
        text = raw if isinstance(raw, Problem) else _decode(raw, number)
        if isinstance(text, Problem):
            yield number, text
        elif text.strip():
            yield number, {"text": text.rstrip("\r\n")}


def _read_parquet(path: Path) -> Iterator[tuple[int, Row | Problem]]:
    import pyarrow as pa  # slow to import, and few files need it
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path, buffer_size=BLOCK, pre_buffer=False) as file:
            meta = file.metadata
            size = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
            batch = max(1, min(1024, (8 << 20) * max(meta.num_rows, 1) // max(size, 1)))
            for part in file.iter_batches(batch_size=batch):
                for row in part.to_pylist():
                    number += 1
                    yield number, _without_nulls(row)
    except (pa.ArrowException, OSError, ValueError) as e:
        reason = str(e).splitlines()[0][:200] if str(e) else type(e).__name__
        yield number + 1, _refuse(number + 1, f"cannot be read: the Parquet file is damaged or cut off ({reason}).")


def _without_nulls(value: Any) -> Any:
    """Parquet gives every message the union of all keys; those that are null were never there."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value
