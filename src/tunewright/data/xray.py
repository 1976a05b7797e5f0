"""The loss mask made visible: each token's text with its weight."""

from __future__ import annotations

from tunewright.core.example import Group
from tunewright.data.tokenizer import Tokenizer


def xray(group: Group, tokenizer: Tokenizer, index: int = 0) -> list[tuple[str, float]]:
    """(text, loss weight) of every token of one example of the group; the texts join to the decoded whole.

    A character that is spread over several tokens is shown at its last one, the others have ''.
    index: which example (1 is the rejected answer of a preference pair).
    """
    example = group.examples[index]
    rows: list[tuple[str, float]] = []
    held: list[int] = []
    for id_, weight in zip(example.ids, example.weights, strict=True):
        held.append(id_)
        text = tokenizer.decode(held, skip_special=False)
        # a byte that is not a whole character yet decodes to the replacement character
        whole = not text.endswith("\ufffd") or len(held) > 4
        rows.append((text if whole else "", weight))
        if whole:
            held = []
    return rows
