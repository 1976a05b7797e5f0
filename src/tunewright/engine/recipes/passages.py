"""Documents cut into passages: paragraphs, packed up to a size, each under the Markdown heading it stands below."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tunewright.core.errors import SpecError
from tunewright.engine.recipes.base import KEY, Row, Source

SUFFIXES = (".txt", ".md", ".markdown")
MAX_BYTES = 64 << 20
_HEADING = re.compile(r"^#{1,6}\s+\S")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


def make_passages(sources: Sequence[Source], size: int) -> Iterator[Row]:
    """{key, source} of each passage of at most `size` characters, document after document. Raises SpecError."""
    total = 0
    for source in sources:
        text = read_document(source)
        total += len(text)
        if total > MAX_BYTES:
            raise SpecError(f"The documents hold more than {MAX_BYTES >> 20} million characters.", param="data")
        for passage in split(text, size):
            yield {KEY: passage, "source": source.name}


def read_document(source: Source) -> str:
    """The text of a .txt or Markdown file in UTF-8. Raises SpecError."""
    if Path(source.name).suffix.lower() not in SUFFIXES:
        raise SpecError(f"'{source.name}' is no document; use files that end in {', '.join(SUFFIXES)}.", param="data")
    try:
        raw = source.path.read_bytes()
    except OSError as e:
        raise SpecError(f"The document '{source.name}' cannot be read: {e.strerror}.", param="data") from e
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise SpecError(f"The document '{source.name}' is not UTF-8 (byte {e.start}).", param="data") from e
    if "\x00" in text:
        raise SpecError(f"The document '{source.name}' is not text: it holds NUL characters.", param="data")
    return text.replace("\r\n", "\n")


def split(text: str, size: int) -> list[str]:
    """Passages of at most `size` characters: whole paragraphs where they fit, else sentences, else pieces.

    A heading begins a new passage, and stands above each passage of its section.
    """
    found: list[str] = []
    heading, body = "", ""
    for part in re.split(r"\n\s*\n", text):
        block = part.strip()
        if _HEADING.match(block):
            found += _close(heading, body)
            first, _, block = block.partition("\n")
            heading, body = first.strip()[: size // 4], ""
        room = size - len(heading) - 1
        for piece in _pieces(block.strip(), room):
            if body and len(body) + 2 + len(piece) > room:
                found += _close(heading, body)
                body = ""
            body = f"{body}\n\n{piece}" if body else piece
    return [*found, *_close(heading, body)]


def _close(heading: str, body: str) -> list[str]:
    return [f"{heading}\n{body}" if heading else body] if body else []


def _pieces(block: str, room: int) -> Iterator[str]:
    """A paragraph whole if it fits, else its sentences packed together, a longer sentence cut between words."""
    if len(block) <= room:
        if block:
            yield block
        return
    held = ""
    for sentence in (p for s in _SENTENCE.split(block) for p in _words(s, room)):
        if held and len(held) + 1 + len(sentence) > room:
            yield held
            held = ""
        held = f"{held} {sentence}" if held else sentence
    if held:
        yield held


def _words(sentence: str, room: int) -> Iterator[str]:
    while len(sentence) > room:
        at = sentence.rfind(" ", 0, room + 1)
        at = at if at > 0 else room
        yield sentence[:at]
        sentence = sentence[at:].lstrip()
    if sentence:
        yield sentence
