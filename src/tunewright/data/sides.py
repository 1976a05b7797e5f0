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

NAMED = 20  # classes that an error names


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


def labelled(row: Conversation, tokenizer: Tokenizer, labels: Sequence[str] | None, several: bool = False) -> Group:
    """A text (or two) with its label; nothing of it is trained as a token.

    labels: the classes, None for values. several: a row may have any number of them.
    """
    ids, types = tokenizer.encode_row(row.text or "", row.text_pair)
    if not ids:
        raise _refused(row, "has a text without any token.", "text")
    kept = tuple(types) if tokenizer.takes_types and any(types) else ()
    example = Example(tuple(ids), (0.0,) * len(ids), row.source, types=kept)
    if several:
        said = row.label if isinstance(row.label, list) else [str(row.label)]
        return Group((replace(example, labels=tuple(sorted(_class(row, s, labels or ()) for s in said))),))
    if isinstance(row.label, list):
        text = f"has a list of {len(row.label)} labels, but the job learns one for each row; use head: multilabel."
        raise _refused(row, text, "label")
    said = str(row.label)
    return Group((replace(example, label=_value(row, said) if labels is None else float(_class(row, said, labels))),))


def _class(row: Conversation, label: str, labels: Sequence[str]) -> int:
    if label not in labels:
        more = f" and {len(labels) - NAMED} more" if len(labels) > NAMED else ""
        known = f"{did_you_mean(label, labels)} Classes: {', '.join(list(labels)[:NAMED])}{more}."
        text = f"has the label '{label[:80]}', which is not a class here.{known} Correct it, or remove the row."
        raise _refused(row, text, "label")
    return labels.index(label)


def framed_pair(row: Conversation, tokenizer: Tokenizer) -> Group:
    """Preferred and rejected answer for a model without a chat template: the input's contents and the answer, as the
    two texts of a row. The weights say no more than that there is something to read."""
    before = [_content(row, m, i) for i, m in enumerate(row.messages)]
    examples = []
    for name, answer in (("preferred_output", row.preferred), ("non_preferred_output", row.rejected)):
        said = "\n".join(m.content or "" for m in answer or [])
        if not said.strip():
            raise _refused(row, f"has no text in {name}; this model has no chat template that could write it.", name)
        ids, types = framed(before, said, tokenizer)
        kept = tuple(types) if tokenizer.takes_types and any(types) else ()
        examples.append(Example(tuple(ids), (0.0, *[1.0] * (len(ids) - 1)), row.source, types=kept))
    return Group(tuple(examples))


def reads_frames(tokenizer: Tokenizer) -> bool:
    """Whether a head reads a conversation as two texts, as framed_pair() writes it, and not through a chat template."""
    return tokenizer.takes_types or not tokenizer.template


def framed(before: list[str], answer: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """([T] ids, [T] types) of a conversation's contents and the answer to it, as the two texts of a row."""
    return tokenizer.encode_row("\n".join(before), answer)


def _value(row: Conversation, label: str) -> float:
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _refused(row, f"has the label '{label[:80]}'; head: regress needs a number.", "label")
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
    keep = _cut(example.ids, n, tokenizer) if example.is_labelled else list(range(len(example.ids)))[:n]
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
