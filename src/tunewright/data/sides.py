"""Rows for models that are no plain decoders: source and target (encoder-decoders), texts with a label (heads)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tunewright.core.conversation import Conversation, Message
from tunewright.core.errors import DataError, Problem, did_you_mean
from tunewright.core.example import Example, Group
from tunewright.data.spans import plain
from tunewright.data.tokenizer import Tokenizer


def answers(row: Conversation, tokenizer: Tokenizer, trained: dict[int, float], start_id: int) -> list[Group]:
    """For an encoder-decoder: each trained turn is a target, and what comes before it its source.

    The source is what the chat template writes, or, without one, the contents of the messages, one below the other.
    trained: message index -> loss weight. start_id: the token with which the decoder begins.
    """
    if row.shape != "chat":
        raise _refused(row, f"is a {row.shape} row; an encoder-decoder needs a prompt and an answer.", "")
    if not trained:
        raise _refused(row, "has no assistant message to train.", "messages")
    groups = []
    for i, weight in trained.items():
        source_ids = tokenizer.encode(_source(row, row.messages[:i], tokenizer), add_special=True)[0]
        target = tokenizer.encode(_content(row, row.messages[i], i), add_special=True)[0]
        ids = (start_id, *target)
        example = Example(ids, (0.0, *[weight] * len(target)), row.source, source_ids=tuple(source_ids))
        groups.append(Group((example,)))
    return groups


def _source(row: Conversation, before: list[Message], tokenizer: Tokenizer) -> str:
    if not before:
        raise _refused(row, "begins with the answer; an encoder-decoder needs a prompt before it.", "messages[0]")
    if tokenizer.template:
        return tokenizer.render([plain(m) for m in before], row.tools, True)
    if row.tools:
        raise _refused(row, "has tools, but the model has no chat template that could write them.", "tools")
    return "\n".join(_content(row, m, i) for i, m in enumerate(before))


def _content(row: Conversation, message: Message, i: int) -> str:
    if message.tool_calls or not message.content:
        text = f"message {i + 1} ({message.role}) has no text; an encoder-decoder learns texts only."
        raise _refused(row, text, f"messages[{i}].content")
    return message.content


def labelled(row: Conversation, tokenizer: Tokenizer, labels: Sequence[str] | None) -> Group:
    """A text (or two) with its label; nothing of it is trained as a token. labels: the classes, None for values."""
    ids, types = tokenizer.encode_row(row.text or "", row.text_pair)
    if not ids:
        raise _refused(row, "has a text without any token.", "text")
    said = str(row.label)
    value = _class(row, said, labels) if labels is not None else _value(row, said)
    kept = tuple(types) if tokenizer.takes_types and any(types) else ()
    return Group((Example(tuple(ids), (0.0,) * len(ids), row.source, types=kept, label=value),))


def _class(row: Conversation, label: str, labels: Sequence[str]) -> float:
    if label not in labels:
        known = f"{did_you_mean(label, labels)} Classes: {', '.join(list(labels)[:20])}."
        raise _refused(row, f"has the label '{label[:80]}', which is not a class here.{known}", "label")
    return float(labels.index(label))


def _value(row: Conversation, label: str) -> float:
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _refused(row, f"has the label '{label[:80]}'; head 'regress' needs a number.", "label")
    return value


def class_names(labels: set[str]) -> tuple[str, ...]:
    """The classes in order: by value if all are numbers, else by name."""

    def key(label: str) -> tuple[float, str]:
        return (float(label) if numeric else 0.0, label)

    numeric = all(label.lstrip("-").replace(".", "", 1).isdigit() for label in labels)
    return tuple(sorted(labels, key=key))


def length(example: Example) -> int:
    """Tokens of the example's longer side."""
    return max(len(example.ids), len(example.source_ids))


def shortened(example: Example, n: int, tokenizer: Tokenizer) -> Example:
    """The example with its end cut off; a row with a label and a source keep their last control tokens."""
    keep = _cut(example.ids, n, tokenizer) if example.label is not None else list(range(len(example.ids)))[:n]
    source = _cut(example.source_ids, n, tokenizer)
    return replace(
        example,
        ids=tuple(example.ids[i] for i in keep),
        weights=tuple(example.weights[i] for i in keep),
        types=tuple(example.types[i] for i in keep) if example.types else (),
        source_ids=tuple(example.source_ids[i] for i in source),
    )


def _cut(ids: Sequence[int], n: int, tokenizer: Tokenizer) -> list[int]:
    """Places of at most n ids: the first ones, then the control tokens at the end."""
    if len(ids) <= n:
        return list(range(len(ids)))
    ends = tokenizer.special_ids | tokenizer.eos_ids
    tail = next((k for k in range(len(ids)) if ids[-1 - k] not in ends), len(ids))
    tail = min(tail, n)
    return [*range(n - tail), *range(len(ids) - tail, len(ids))]


def _refused(row: Conversation, text: str, field: str) -> DataError:
    problem = Problem(row.source, text, field)
    return DataError(str(problem), problems=[problem])
