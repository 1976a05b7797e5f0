"""From token ids to text while it is still growing: whole characters only, and nothing that may become a stop text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

BROKEN = "\ufffd"
_UNFINISHED = 3  # bytes that an unfinished UTF-8 character can have
_WINDOW = 48  # tokens decoded again at most; a new window starts with the last _CONTEXT of the old one
_CONTEXT = 6


@dataclass
class Detokeniser:
    """Decodes token by token; what it returned, joined, is the text of all tokens.

    decode: token ids -> text. Some tokenizers glue a token to its neighbours, so a few tokens before it are decoded
    along, and characters whose bytes are not complete wait.
    """

    decode: Callable[[list[int]], str]
    _ids: list[int] = field(default_factory=list)
    _sent: int = 0
    _pending: bool = False

    def push(self, token: int) -> str:
        """The characters that `token` completes; may be empty."""
        self._ids.append(token)
        text = self.decode(self._ids)
        broken = len(text) - len(text.rstrip(BROKEN))
        ready = len(text) - min(broken, _UNFINISHED)
        new = text[self._sent : ready] if ready > self._sent else ""
        self._sent = max(self._sent, ready)
        self._pending = ready < len(text)
        if len(self._ids) > _WINDOW and not self._pending:
            self._ids = self._ids[-_CONTEXT:]
            self._sent = len(self.decode(self._ids))
        elif len(self._ids) > 4 * _WINDOW:  # a long run of bytes that are no text at all
            self._ids, self._sent = self._ids[-_CONTEXT:], 0
            self._sent = max(0, len(self.decode(self._ids)) - _UNFINISHED)
        return new

    @property
    def pending(self) -> bool:
        """Whether the last token left a character unfinished."""
        return self._pending

    def finish(self) -> str:
        """What is left: an unfinished character shows as U+FFFD."""
        new = self.decode(self._ids)[self._sent :]
        self._ids, self._sent = [], 0
        return new


@dataclass(frozen=True)
class Piece:
    """Text that is safe to show. position: the generated token (from 0) that completed it."""

    position: int
    text: str


@dataclass
class TextStream:
    """The text of one choice as it grows: pieces come out once they cannot become part of a stop text any more.

    decode: token ids -> text. stops: texts that end the choice. hold: from this text on everything waits for
    finish() (a tool call is shown parsed, or not at all); empty: nothing is held.
    """

    decode: Callable[[list[int]], str]
    stops: tuple[str, ...] = ()
    hold: str = ""
    stopped: bool = False
    shown: str = ""
    _raw: str = ""
    _waiting: list[Piece] = field(default_factory=list)
    _n_tokens: int = 0
    _searched: int = 0

    def __post_init__(self) -> None:
        self._detokeniser = Detokeniser(self.decode)

    def push(self, token: int) -> list[Piece]:
        """Take one token; returns the pieces that are now safe. Sets `stopped` when a stop text is complete."""
        start = len(self._raw)
        self._grow(self._detokeniser.push(token))
        self._waiting.append(Piece(self._n_tokens, self._raw[start:]))
        self._n_tokens += 1
        return self._release(self._safe_end(), whole=self.stopped)

    @property
    def held(self) -> str:
        """The text from `hold` on, which was not shown."""
        return self._raw[len(self.shown) :]

    def finish(self, drop_held: bool = False) -> list[Piece]:
        """Everything that is left; with drop_held the held text is not shown at all."""
        if drop_held:
            self._waiting = []
            return []
        return self._release(len(self._raw), whole=True)

    def flush(self) -> None:
        """Complete the text with what the detokeniser still keeps. Call once, after the last token."""
        if not self.stopped and self._detokeniser.pending:
            last, start = self._waiting.pop(), len(self._raw)
            self._grow(self._detokeniser.finish())
            self._waiting.append(Piece(last.position, last.text + self._raw[start:]))

    def _grow(self, text: str) -> None:
        start = len(self._raw)
        self._raw += text
        ends = [at for s in self.stops if (at := self._raw.find(s, max(0, start - len(s) + 1))) >= 0]
        if ends:
            self.stopped = True
            self._raw = self._raw[: min(ends)]

    def _safe_end(self) -> int:
        """Up to where the text can be shown: not the beginning of a stop text, nothing that is held."""
        end = len(self._raw)
        if self.stopped:
            return end
        if self.hold and (at := self._raw.find(self.hold)) >= 0:
            return at
        for mark in (*self.stops, *([self.hold] if self.hold else [])):
            lengths = range(min(len(mark) - 1, len(self._raw)), 0, -1)
            end = min(end, len(self._raw) - next((n for n in lengths if self._raw.endswith(mark[:n])), 0))
        return end

    def _release(self, end: int, whole: bool) -> list[Piece]:
        """Take out the waiting pieces that lie before `end`. A piece that crosses it waits, and so does the last one
        while its character is unfinished; with `whole`, the text ends at `end` and the crossing piece is cut there.
        """
        out, at = [], len(self.shown)
        while self._waiting and at + len(self._waiting[0].text) <= end:
            if not whole and len(self._waiting) == 1 and self._detokeniser.pending:
                break
            piece = self._waiting.pop(0)
            at += len(piece.text)
            out.append(piece)
        if self.stopped:
            out = [p for p in out if p.text]
            if self._waiting and end > at:
                out.append(Piece(self._waiting[0].position, self._waiting[0].text[: end - at]))
            self._waiting = []
        self.shown += "".join(p.text for p in out)
        return out


def token_bytes(token: str | None, text: str) -> list[int] | None:
    """The UTF-8 bytes of a token. token: its spelling in the vocabulary; text: what it decodes to.

    A part of a character decodes to U+FFFD; its bytes then come from the spelling (byte-level BPE, or `<0xE2>`). None
    if that does not tell.
    """
    if BROKEN not in text:
        return list(text.encode())
    if token is None:
        return None
    if len(token) == 6 and token.startswith("<0x"):
        return [int(token[3:5], 16)]
    table = _byte_alphabet()
    return [table[c] for c in token] if all(c in table for c in token) else None


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's letters: printable bytes stand for themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {**{chr(b): b for b in printable}, **{chr(0x100 + i): b for i, b in enumerate(others)}}
