"""Where in a rendered conversation the trained turns are, and the proof that nothing was left out of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tunewright.core.conversation import Message
from tunewright.core.errors import DataError, Problem, UserError
from tunewright.data.tokenizer import Tokenizer

THINK_END = "</think>"
MARK = "\u2039where the content begins\u203a"


@dataclass(frozen=True)
class Span:
    """Characters that the model is to write. start, end: range in the text; told: end of the content proper."""

    start: int
    end: int
    told: int


@dataclass(frozen=True)
class Turns:
    """What to render: messages as the template takes them, which of them are trained, and names for error messages.

    trained: message index -> loss weight. names: field path of each message. line: the row in its file.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    trained: dict[int, float]
    names: list[str]
    line: int


@dataclass(frozen=True)
class Written:
    """One rendered text and its spans, each with a loss weight."""

    text: str
    spans: list[tuple[Span, float]]


def write(turns: Turns, tokenizer: Tokenizer) -> list[Written]:
    """The conversation's text with the spans of its trained turns.

    One text for all of them, if the template writes a turn the same way whatever follows. A template that rewrites
    earlier turns (drops old thinking) gives one text for each trained turn, cut off after it.
    Raises DataError with line and field if the template refuses the row or leaves something out.
    """
    full = _render(turns, len(turns.messages), tokenizer)
    parts = [(i, *_boundaries(turns, i, full, tokenizer)) for i in turns.trained]
    if all(full.startswith(through) for _, _, through in parts):
        parts = [(i, start, len(through)) for i, start, through in parts]
        return [_proved(turns, full, parts, len(turns.messages))]
    return [_proved(turns, through, [(i, start, len(through))], i + 1) for i, start, through in parts]


def _boundaries(turns: Turns, i: int, full: str, tokenizer: Tokenizer) -> tuple[int, str]:
    """Where turn i begins after the generation prompt, and the text up to its end."""
    through = full if i + 1 == len(turns.messages) else _render(turns, i + 1, tokenizer)
    if i:
        prompt = _render(turns, i, tokenizer, add_generation_prompt=True)
        if through.startswith(prompt):
            return len(prompt), through
    # no turn before it, or a prompt that ends in e.g. `<think>`, which past turns do not have: ask the template where
    # a turn begins, by giving it another content (and no calls, which some templates write before the content)
    other = {k: v for k, v in turns.messages[i].items() if k != "tool_calls"} | {"content": MARK}
    marked = _render(replace(turns, messages=[*turns.messages[:i], other]), i + 1, tokenizer)
    return _common(marked.partition(MARK)[0], through), through


def _common(a: str, b: str) -> int:
    """How many leading characters two texts share."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _render(turns: Turns, n: int, tokenizer: Tokenizer, add_generation_prompt: bool = False) -> str:
    """The first n messages. A refusal by the template names the row."""
    try:
        return tokenizer.render(turns.messages[:n], turns.tools, add_generation_prompt)
    except UserError as e:
        raise _refusal(turns, e.message, turns.names[0].rsplit("[", 1)[0]) from e


def _refusal(turns: Turns, message: str, field: str, value: str = "") -> DataError:
    problem = Problem(turns.line, message, field, value[:200])
    return DataError(str(problem), problems=[problem])


def _proved(turns: Turns, text: str, parts: list[tuple[int, int, int]], n: int) -> Written:
    """Check that all of the first n messages are in the text, and note where the trained content ends."""
    _prove_tools(turns, text)
    ranges = {i: (start, end) for i, start, end in parts}
    told = {}
    at = 0
    for i, message in enumerate(turns.messages[:n]):
        if i in ranges:
            start, end = ranges[i]
            # a prompt that ends in `<think>` may hold the first characters of the content
            early = min(start, max(at, start - len(message.get("content") or "")))
            told[i] = at = _told(turns, i, text[start:end], text[early:start]) + start
        else:
            at = _prove_context(turns, i, message, text, at)
    return Written(text, [(Span(*ranges[i], told[i]), turns.trained[i]) for i in ranges])


def _prove_tools(turns: Turns, text: str) -> None:
    for j, tool in enumerate(turns.tools or ()):
        name = tool["function"]["name"]
        if name not in text:
            raise _refusal(
                turns,
                f"the model's chat template leaves out the row's tools ('{name[:80]}'), so it would be trained without "
                "them. Remove the tools, or use a model or chat template that supports them.",
                f"tools[{j}]",
                name,
            )


def _told(turns: Turns, i: int, region: str, before: str) -> int:
    """Where in the region of trained turn i its content ends; proves that all of it is there.

    before: the text just before the region, in which the content may begin.
    """
    message, ends = turns.messages[i], [0]
    content = message.get("content") or ""
    if content.strip():
        end = _find(region, content, 0)
        if end < 0:
            end = max(_find(before + region, content, 0), _find_loosely(before + region, content)) - len(before)
        if end < 0:
            raise _left_out(turns, i, "content", content)
        ends.append(end)
    for j, call in enumerate(message.get("tool_calls") or ()):
        end = _find_call(region, call["function"])
        if end < 0:
            raise _left_out(turns, i, f"tool_calls[{j}]", call["function"]["name"])
        ends.append(end)
    return max(ends)


def _prove_context(turns: Turns, i: int, message: dict[str, Any], text: str, at: int) -> int:
    """Prove that an untrained message is in the text, at or after `at`; returns where it ends."""
    content = message.get("content") or ""
    if content.strip():
        answer = content.rsplit(THINK_END, 1)[-1] if message["role"] == "assistant" else content
        ends = [_find(text, piece, start) for start in (at, 0) for piece in (content, answer)]
        end = next((e for e in ends if e >= 0), -1)
        if end < 0:
            raise _left_out(turns, i, "content", content)
        at = max(at, end) if end in ends[:2] else at
    for j, call in enumerate(message.get("tool_calls") or ()):
        if _find_call(text, call["function"]) < 0:
            raise _left_out(turns, i, f"tool_calls[{j}]", call["function"]["name"])
    return at


def _left_out(turns: Turns, i: int, key: str, value: str) -> DataError:
    role = turns.messages[i]["role"]
    what = "content" if key == "content" else f"tool call '{value[:80]}'"
    return _refusal(
        turns,
        f"message {i + 1} ({role}): the model's chat template leaves its {what} out, so it would never be seen. "
        "Remove the row, or use a model or chat template that supports it.",
        f"{turns.names[i]}.{key}",
        value,
    )


def _find(text: str, piece: str, at: int) -> int:
    """Where `piece` ends in `text`, as it is, stripped, or as a JSON string; -1 if it is not there."""
    for form in _forms(piece):
        found = text.find(form, at)
        if found >= 0:
            return found + len(form)
    return -1


def _forms(piece: str) -> Iterator[str]:
    yield piece
    yield piece.strip()
    for ascii_only in (False, True):
        yield json.dumps(piece, ensure_ascii=ascii_only)[1:-1]


def _find_loosely(region: str, content: str) -> int:
    """Like _find, but white space may differ (a template that sets thinking and answer apart again)."""
    if "".join(content.split()) not in "".join(region.split()):
        return -1
    last_word = content.split()[-1]
    return region.rfind(last_word) + len(last_word)


def _find_call(text: str, function: dict[str, Any]) -> int:
    """Where a call's name and arguments end in `text`; -1 if one of them is missing."""
    name_at = text.find(function["name"])
    if name_at < 0:
        return -1
    end, raw = name_at + len(function["name"]), function["arguments"]
    arguments = json.loads(raw) if isinstance(raw, str) else raw
    for form in _spellings(raw, arguments):
        found = text.find(form)
        if found >= 0:
            return max(end, found + len(form))
    leaves = list(_leaves(arguments))
    found = [_find(text, leaf, 0) for leaf in leaves]
    return -1 if -1 in found else max([end, *found])


def _spellings(raw: Any, arguments: Any) -> Iterator[str]:
    """The usual ways to write arguments as JSON."""
    if isinstance(raw, str):
        yield raw
    styles: list[dict[str, Any]] = [{}, {"separators": (",", ":")}, {"indent": 2}, {"indent": 4}, {"sort_keys": True}]
    for options in styles:
        yield json.dumps(arguments, ensure_ascii=False, **options)


def _leaves(value: Any) -> Iterator[str]:
    """Keys and scalars, as text, for templates that write arguments as tags."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value if isinstance(value, str) else json.dumps(value)


def plain(message: Message) -> dict[str, Any]:
    """A message as the template takes it: plain data without nulls and without the loss weight."""
    if message.tool_calls is None and message.name is None and message.tool_call_id is None:
        return {"role": message.role, "content": message.content}
    return message.model_dump(exclude_none=True, exclude={"weight"})
