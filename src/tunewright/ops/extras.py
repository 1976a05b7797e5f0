"""What only some examples have, as tensors of a batch: an encoder's side, token types, labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from tunewright.core.example import Example
from tunewright.ops.types import Source

Numbers = Mapping[str, tuple[float, ...]]


def extras(examples: Sequence[Example]) -> dict[str, Any]:
    """The fields types_T, source, per_token and per_segment of a Batch of these examples, as far as one has such.

    Raises ValueError if only some examples have a source: an encoder-decoder needs one for each.
    """
    found: dict[str, Any] = {}
    if any(e.per_token for e in examples):
        found["per_token"] = of_targets([e.per_token for e in examples], [len(e.ids) for e in examples])
    if any(e.types for e in examples):
        found["types_T"] = torch.tensor([t for e in examples for t in e.types or (0,) * len(e.ids)])
    if any(e.source_ids for e in examples):
        if not all(e.source_ids for e in examples):
            raise ValueError("some examples of a batch have source ids and some have none")
        found["source"] = Source(
            torch.tensor([t for e in examples for t in e.source_ids]),
            torch.tensor([0, *accumulate(len(e.source_ids) for e in examples)], dtype=torch.int32),
        )
    named = ("label", "margin", "wanted")
    of_rows = {name: numbers(examples, name) for name in named if _any(examples, name)}
    if _any(examples, "labels"):
        of_rows["labels"] = _classes(examples)
    return found | ({"per_segment": of_rows} if of_rows else {})


def _any(examples: Sequence[Example], field: str) -> bool:
    return any(getattr(e, field) is not None for e in examples)


def numbers(examples: Sequence[Any], field: str) -> torch.Tensor:
    """[S] float32, NaN where an example has none; yes is 1 and no is 0."""
    values = [getattr(e, field) for e in examples]
    return torch.tensor([float("nan") if v is None else float(v) for v in values], dtype=torch.float32)


def of_targets(given: Sequence[Numbers | None], lengths: Sequence[int]) -> dict[str, torch.Tensor]:
    """{name: [T] float32} of texts of these lengths: what each position predicts has, 0 at a text's end or without it.

    given: {name: [length]} of the tokens themselves, for each text, or None.
    """
    names = sorted({name for own in given for name in own or ()})
    return {
        name: torch.tensor(
            [v for own, n in zip(given, lengths, strict=True) for v in (*(own or {}).get(name, (0.0,) * n)[1:], 0.0)],
            dtype=torch.float32,
        )
        for name in names
    }


def _classes(examples: Sequence[Example]) -> torch.Tensor:
    """[S, K] float32: 1 for each class of a row, else 0; NaN where it is not known. K: up to the largest one here."""
    width = 1 + max((k for e in examples for k in e.labels or ()), default=0)
    rows = torch.zeros(len(examples), width)
    for row, e in zip(rows, examples, strict=True):
        if e.labels is None:
            row.fill_(float("nan"))
        else:
            row[list(e.labels)] = 1.0
    return rows
