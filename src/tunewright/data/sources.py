"""Rows out of a file, one at a time: JSON Lines, a JSON array, CSV, Parquet, plain text lines.

Memory stays flat whatever the file holds: a line or element has at most LINE_LIMIT bytes. What cannot be read becomes a
Problem in place of the row, so that one pass finds everything.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path

from tunewright.core.errors import Problem
from tunewright.data.jsonrows import read_array, read_jsonl
from tunewright.data.lines import HEAD, Row, open_file, refuse
from tunewright.data.tables import HEADERS, read_csv, read_parquet, read_text

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


def read_rows(path: Path, name: str = "") -> Iterator[tuple[int, Row | Problem]]:
    """Every row with its 1-based line (JSON Lines), element (JSON array) or row number (CSV, Parquet).

    name: the file's name as the user knows it; its ending helps to tell CSV from text. Blank lines are skipped.
    Raises DataError if the file cannot be opened at all.
    """
    kind = sniff(path, name)
    if isinstance(kind, Problem):
        yield kind.line, kind
    elif kind == "parquet":
        yield from read_parquet(path)
    else:
        with open_file(path) as f:
            yield from {"jsonl": read_jsonl, "json": read_array, "csv": read_csv, "txt": read_text}[kind](f)


def sniff(path: Path, name: str = "") -> str | Problem:
    """Which of KINDS a file is, from its first bytes, then from its name; or why it is none of them."""
    with open_file(path) as f:
        head = f.read(HEAD)
    if head.startswith(b"PAR1"):
        return "parquet"
    for mark, what in UTF_MARKS.items():
        if head.startswith(mark):
            return _wide(what)
    for mark, what in MAGIC.items():
        if head.startswith(mark):
            return refuse(1, f"cannot be read: the file is {what}, not JSON Lines, JSON, CSV or Parquet.")
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
    return refuse(1, "cannot be read: it holds NUL bytes, so the file is damaged or is not text.")


def _wide(what: str) -> Problem:
    return refuse(
        1, f"cannot be read: the file is {what} text. Save it as UTF-8 (`iconv -f {what} -t UTF-8 old > new`)."
    )
