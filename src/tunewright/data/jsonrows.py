"""Rows out of JSON Lines and out of a JSON array, piece by piece; notices duplicate keys, NaN and half characters."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from tunewright.core.errors import Problem
from tunewright.data.lines import BLOCK, LINE_LIMIT, Row, decode, read_lines, refuse

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Parser:
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
            return refuse(
                number,
                "Expected file to have JSONL format, where every line is a valid JSON dictionary. "
                f'Line {number} is not a dictionary (HINT: line starts with: "{start}...").',
                value=start,
            )
        flaw = self.flaw(value, source)
        return value if flaw is None else refuse(number, *flaw)

    def flaw(self, value: Any, source: str) -> tuple[str, str] | None:
        """(message, field) of something that JSON's grammar allows but a row must not have."""
        if self.flaws:
            return self.flaws[0], ""
        where = next(_broken_text(value), None) if _SURROGATE.search(source) else None
        if where is None:
            return None
        return "holds half of a surrogate pair (\\ud800 to \\udfff alone), which is no character.", where


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


def read_jsonl(f: BinaryIO) -> Iterator[tuple[int, Row | Problem]]:
    parser = Parser()
    for number, raw in read_lines(f):
        if isinstance(raw, bytes) and not raw.strip():
            continue
        text = raw if isinstance(raw, Problem) else decode(raw, number)
        yield number, text if isinstance(text, Problem) else _parse_line(parser, text, number)


def _parse_line(parser: Parser, text: str, number: int) -> Row | Problem:
    try:
        return parser.check(parser.line(text), number, text)
    except json.JSONDecodeError as e:
        return refuse(
            number,
            f"cannot be parsed. Error: line contains invalid json: {e} (line {number}).{_json_hint(text, e)}",
            value=text[max(0, e.pos - 20) : e.pos + 20].strip(),
        )
    except RecursionError:
        return refuse(number, "is nested too deeply.")
    except ValueError as e:
        return refuse(number, f"cannot be parsed: {e}.")


def _json_hint(text: str, e: json.JSONDecodeError) -> str:
    """The likely cause of a JSON error, as one more sentence."""
    body = text.strip()
    at = text[e.pos : e.pos + 1]
    hints = (
        (body in ("{", "["), "Each row must be on one line, or the whole file one JSON array."),
        (at in ("}", "]") and text[: e.pos].rstrip().endswith(","), "Remove the comma before the closing bracket."),
        (at == "'" or body.startswith("{'"), "JSON wants double quotes; write rows with json.dumps."),
        (_cut_off(text, e) and not text.endswith("\n"), "The file ends in the middle of this row: it was cut off."),
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

    def value(self, parser: Parser) -> Any:
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


def read_array(f: BinaryIO) -> Iterator[tuple[int, Row | Problem]]:
    """Elements of one JSON array. After a syntax error nothing more can be read, so the last item says that."""
    window, parser, number = _Window(f), Parser(), 0
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
                yield number, refuse(number, f"must be followed by ',' or ']', not by {what}. Reading stopped here.")
                return
            window.at += 1
        window.at += 1
        if window.peek():
            yield (
                max(number, 1),
                refuse(max(number, 1), "is followed by more text after the closing ']' of the array."),
            )
    except UnicodeDecodeError as e:
        yield number + 1, refuse(number + 1, f"is not UTF-8 (byte 0x{e.object[e.start]:02x}). Save the file as UTF-8.")
    except RecursionError:
        yield number, refuse(number, "is nested too deeply. Reading stopped here.")
    except ValueError as e:
        cut = " The file ends in the middle of this element: it was cut off." if window.ended else ""
        text = getattr(e, "msg", str(e))
        yield number, refuse(number, f"cannot be parsed: {text}.{cut} Reading stopped here.")
