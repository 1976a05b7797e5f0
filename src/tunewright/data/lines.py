"""Bytes of a text file as numbered lines of bounded size, and the Problem for a line that cannot be read."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tunewright.core.errors import DataError, Problem

LINE_LIMIT = 16 << 20
BLOCK = 1 << 20
HEAD = 1 << 16
BAD_FORMAT = "invalid_file_format"

Row = dict[str, Any]


def open_file(path: Path) -> BinaryIO:
    try:
        return open(path, "rb", buffering=BLOCK)
    except OSError as e:
        raise DataError(f"The file '{path.name}' cannot be opened: {e.strerror}.") from e


def refuse(line: int, message: str, field: str = "", value: str = "") -> Problem:
    return Problem(line, message, field, value, code=BAD_FORMAT)


def read_lines(f: BinaryIO) -> Iterator[tuple[int, bytes | Problem]]:
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
            refuse(
                number,
                f"is longer than {LINE_LIMIT >> 20} MiB, the limit for one row. Is every row on a line of its own?",
            ),
        )


def decode(raw: bytes, number: int) -> str | Problem:
    if b"\x00" in raw:
        return refuse(number, "holds NUL bytes: the file is damaged or was cut off by a crash.")
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        return refuse(
            number,
            f"is not UTF-8: byte 0x{raw[e.start]:02x} at position {e.start + 1}. Save the file as UTF-8.",
            value=raw[max(0, e.start - 20) : e.start + 20].decode("latin-1"),
        )
