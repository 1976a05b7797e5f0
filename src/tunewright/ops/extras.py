"""What only some examples have, as tensors of a batch: an encoder's side, token types, labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from tunewright.core.example import Example
from tunewright.ops.types import Source


def extras(examples: Sequence[Example]) -> dict[str, Any]:
    """The fields types_T, source and per_segment of a Batch of these examples, as far as one of them has such a thing.

    Raises ValueError if only some examples have a source: an encoder-decoder needs one for each.
    """
    found: dict[str, Any] = {}
    if any(e.types for e in examples):
        found["types_T"] = torch.tensor([t for e in examples for t in e.types or (0,) * len(e.ids)])
    if any(e.source_ids for e in examples):
        if not all(e.source_ids for e in examples):
            raise ValueError("some examples of a batch have source ids and some have none")
        found["source"] = Source(
            torch.tensor([t for e in examples for t in e.source_ids]),
            torch.tensor([0, *accumulate(len(e.source_ids) for e in examples)], dtype=torch.int32),
        )
    if any(e.label is not None for e in examples):
        labels = [float("nan") if e.label is None else e.label for e in examples]
        found["per_segment"] = {"label": torch.tensor(labels, dtype=torch.float32)}
    if any(e.wanted is not None for e in examples):
        found["per_segment"] = {**found.get("per_segment", {}), "wanted": wanted([e.wanted for e in examples])}
    return found


def wanted(marks: Sequence[bool | None]) -> torch.Tensor:
    """[S] float32: 1 for a good answer, 0 for a bad one, NaN for one that nobody marked."""
    return torch.tensor([math.nan if m is None else float(m) for m in marks], dtype=torch.float32)
