"""Text that grows token by token: whole characters, stop texts, nothing lost and nothing twice."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tunewright.data.tokenizer import Tokenizer
from tunewright.engine.text import Detokeniser, Piece, TextStream, token_bytes
from tunewright.engine.tools import MARK, parse_tool_calls

TEXT = "Größe: 5 € – 你好, 👩🏽‍🚀! def f(x):\n\treturn x  # ende"


def words(ids: list[int]) -> str:
    """A decoder whose tokens are single characters."""
    return "".join(chr(i) for i in ids)


def as_bytes(ids: list[int]) -> str:
    """A decoder whose tokens are single bytes, as byte-level BPE decodes them."""
    return bytes(ids).decode("utf-8", errors="replace")


def stream_of(text: str, **options) -> tuple[TextStream, list[Piece]]:
    """A stream after all characters of `text`, until it stops, and what it showed."""
    stream, shown = TextStream(words, **options), []
    for c in text:
        shown += stream.push(ord(c))
        if stream.stopped:
            break
    stream.flush()
    return stream, shown + stream.finish()


def test_bytes_become_whole_characters() -> None:
    detokeniser = Detokeniser(as_bytes)
    pieces = [detokeniser.push(b) for b in TEXT.encode()]
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in p for p in pieces)
    assert detokeniser.finish() == ""


@pytest.mark.parametrize("seed", range(20))
def test_any_tokens_joined_are_their_decoding(seed: int, tiny_model_dir: Path) -> None:
    """Random ids of a real byte-level tokenizer, most of them not even valid UTF-8."""
    tokenizer = Tokenizer.load(tiny_model_dir)
    rng = random.Random(seed)
    ids = [rng.randrange(3, tokenizer.vocab_size) for _ in range(rng.randrange(1, 45))]
    stream = TextStream(tokenizer.decode)
    pieces = [p for i in ids for p in stream.push(i)]
    stream.flush()
    pieces += stream.finish()
    assert "".join(p.text for p in pieces) == stream.shown == tokenizer.decode(ids)
    assert [p.position for p in pieces] == list(range(len(ids)))


def test_long_text_is_its_decoding(tiny_model_dir: Path) -> None:
    tokenizer = Tokenizer.load(tiny_model_dir)
    ids, _ = tokenizer.encode(TEXT * 20)
    stream = TextStream(tokenizer.decode)
    pieces = [p for i in ids for p in stream.push(i)]
    stream.flush()
    assert "".join(p.text for p in [*pieces, *stream.finish()]) == TEXT * 20


def test_endless_garbage_stays_cheap() -> None:
    """A model that emits broken bytes for ever must not make each step dearer than the last."""
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return as_bytes(ids)

    detokeniser = Detokeniser(decode)
    for _ in range(2000):
        detokeniser.push(0x80)
    assert longest < 300


def test_unfinished_character_shows_at_the_end_once() -> None:
    stream = TextStream(as_bytes)
    first = stream.push(ord("a"))
    assert [p.text for p in first] == ["a"]
    assert stream.push("€".encode()[0]) == []
    stream.flush()
    assert stream.finish() == [Piece(1, "\ufffd")]
    assert stream.shown == "a\ufffd"


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("hello END world", ("END",), "hello "),
        ("aaab", ("aab",), "a"),
        ("ababac", ("abac",), "ab"),
        ("no stop here", ("STOP",), "no stop here"),
        ("ends with ST", ("STOP",), "ends with ST"),
        ("xSTOPy", ("TO", "STOP"), "xS"),
        ("STOP", ("STOP",), ""),
        ("one\ntwo", ("\n",), "one"),
        ("mixed", ("zz", "xe", "ixe"), "m"),
    ],
)
def test_stop_texts(text: str, stops: tuple[str, ...], shown: str) -> None:
    stream, pieces = stream_of(text, stops=stops)
    assert stream.shown == "".join(p.text for p in pieces) == shown
    assert stream.stopped == (shown != text)


def test_nothing_of_a_stop_text_is_ever_shown() -> None:
    stream = TextStream(words, stops=("</answer>",))
    seen = ""
    for c in "x < y </ans wer> z </answer> never":
        seen += "".join(p.text for p in stream.push(ord(c)))
        assert not any(seen.endswith("</answer>"[:n]) for n in range(1, 10))
        if stream.stopped:
            break
    assert seen == "x < y </ans wer> z "


def test_a_stop_inside_a_token_cuts_it() -> None:
    stream = TextStream(lambda ids: "".join(["Hello", " wor.ld", " again"][i] for i in ids), stops=(".",))
    pieces = [p for i in range(3) if not stream.stopped for p in stream.push(i)]
    assert pieces == [Piece(0, "Hello"), Piece(1, " wor")]


def test_held_text_waits_for_the_end() -> None:
    stream, _ = stream_of('Sure. <tool_call>{"name": "f"}</tool_call>', hold=MARK)
    assert stream.shown.startswith("Sure. <tool")
    stream = TextStream(words, hold=MARK)
    early = "".join(p.text for c in 'Sure. <tool_call>{"name": "f"}' for p in stream.push(ord(c)))
    assert early == "Sure. "
    stream.flush()
    assert stream.held == '<tool_call>{"name": "f"}'
    assert stream.finish(drop_held=True) == []
    assert stream.shown == "Sure. "


def test_tool_calls_are_parsed() -> None:
    text = (
        '<tool_call>\n{"name": "f", "arguments": {"x": {"y": 1}}}\n</tool_call>\n<tool_call>{"name": "g"}</tool_call>'
    )
    first, second = parse_tool_calls(text)
    assert first["function"] == {"name": "f", "arguments": '{"x": {"y": 1}}'}
    assert first["id"].startswith("call_") and first["type"] == "function"
    assert second["function"] == {"name": "g", "arguments": "{}"}


@pytest.mark.parametrize(
    "text", ["", "plain", "<tool_call>{broken</tool_call>", "<tool_call>[1]</tool_call>", "<tool_call>"]
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert parse_tool_calls(text) == []


def test_a_good_call_beside_a_bad_one_stays_text() -> None:
    assert parse_tool_calls('<tool_call>{"name": "f"}</tool_call> <tool_call>{"no": 1}</tool_call>') == []


def test_token_bytes(tiny_model_dir: Path) -> None:
    tokenizer = Tokenizer.load(tiny_model_dir)
    ids, _ = tokenizer.encode(TEXT)
    found = [token_bytes(tokenizer.token(i), tokenizer.decode([i])) for i in ids]
    assert b"".join(bytes(b or []) for b in found) == TEXT.encode()
    assert token_bytes("<0xE2>", "\ufffd") == [0xE2]
    assert token_bytes(None, "\ufffd") is None
    assert token_bytes("odd token", "\ufffd") is None
