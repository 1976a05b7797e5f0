"""Rows out of CSV, Parquet and plain text lines, in constant memory."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from tunewright.core.errors import Problem
from tunewright.data.jsonrows import Parser
from tunewright.data.lines import BLOCK, LINE_LIMIT, Row, decode, read_lines, refuse

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


class _Stop(Exception):
    """Ends the reading of a CSV file with one problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def _text_lines(f: BinaryIO) -> Iterator[str]:
    for number, raw in read_lines(f):
        text = raw if isinstance(raw, Problem) else decode(raw, number)
        if isinstance(text, Problem):
            raise _Stop(text)
        yield text


def read_csv(f: BinaryIO) -> Iterator[tuple[int, Row | Problem]]:
    number = 0
    try:
        lines = _text_lines(f)
        first = next(lines, "")
        delimiter = max(",;\t", key=first.count)
        csv.field_size_limit(LINE_LIMIT)  # process-wide in the standard library; its default of 128 KiB is too small
        header = _header(first, delimiter)
        reader, parser = csv.reader(lines, delimiter=delimiter, strict=True), Parser()
        while True:
            number += 1
            try:
                values = next(reader)
            except csv.Error as e:
                yield number, refuse(number, f"cannot be parsed as CSV: {e}.")
                continue
            if values:
                yield number, _csv_row(header, values, number, parser)
            else:
                number -= 1
    except StopIteration:
        return
    except _Stop as stop:
        yield max(number, 1), replace(stop.problem, line=max(number, 1))


def _header(line: str, delimiter: str) -> list[str]:
    try:
        names = [h.strip() for h in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error as e:
        raise _Stop(refuse(1, f"has a header that cannot be parsed as CSV: {e}.")) from e
    if len(set(names)) != len(names) or "" in names:
        raise _Stop(refuse(1, f"has a header with an empty or repeated column name: {', '.join(names)[:200]}."))
    return names


def _csv_row(header: list[str], values: list[str], number: int, parser: Parser) -> Row | Problem:
    if len(values) != len(header):
        return refuse(
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
            row[column] = parser.line(cell)
        except (ValueError, RecursionError) as e:
            return refuse(number, f"column '{column}' holds invalid JSON: {str(e)[:200]}.", column, cell[:80])
        flaw = parser.flaw(row[column], cell)
        if flaw is not None:
            return refuse(number, f"column '{column}' {flaw[0]}", column + flaw[1])
    return row


def read_text(f: BinaryIO) -> Iterator[tuple[int, Row | Problem]]:
    for number, raw in read_lines(f):
        text = raw if isinstance(raw, Problem) else decode(raw, number)
        if isinstance(text, Problem):
            yield number, text
        elif text.strip():
            yield number, {"text": text.rstrip("\r\n")}


def read_parquet(path: Path) -> Iterator[tuple[int, Row | Problem]]:
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
        yield number + 1, refuse(number + 1, f"cannot be read: the Parquet file is damaged or cut off ({reason}).")


def _without_nulls(value: Any) -> Any:
    """Parquet gives every message the union of all keys; those that are null were never there."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value
