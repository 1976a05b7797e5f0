"""The tensor types at the joints: Batch, Term. Shape suffixes: T tokens of the pack, S segments, G groups."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Source:
    """What an encoder-decoder reads: one segment for each of the batch's, in the same order.

    tokens_U: [U] int64 token ids. cu_seqlens: [S+1] int32 cumulative lengths, from 0 to U.
    """

    tokens_U: Tensor
    cu_seqlens: Tensor

    def to(self, device: torch.device | str) -> Source:
        return Source(self.tokens_U.to(device), self.cu_seqlens.to(device))


@dataclass(frozen=True)
class Batch:
    """Packed groups: all segments (examples) of a micro-batch in one row, without padding.

    tokens_T: [T] int64 token ids.
    targets_T: [T] int64, the token that follows within the same segment (0 at a segment's last position).
    weights_T: [T] float32 loss weight of the target (0 at a segment's last position).
    position_T: [T] int64 position within the segment, from 0.
    cu_seqlens: [S+1] int32 cumulative segment lengths, from 0 to T.
    parent_S: [S] int64, -1 or the segment whose prefix this one continues.
    group_S: [S] int64 the group of each segment, 0..G-1.
    last_S: [S] int64 index into T of each segment's last token (for heads).
    source_S: [S] int64 the row's number in its file.
    noise_T: [T] int64 keys of the step's dropout and embedding noise (ops/noise.py), or None for no noise.
    types_T: [T] int64 which text of a pair each token belongs to (BERT's token types), or None: all 0.
    source: the encoder's side, for encoder-decoders only.
    per_token: further [T] float32 tensors by name, of the targets as weights_T (advantages, old log-probabilities).
    per_segment, per_group: further [S] and [G] tensors by name (rewards, reference log-probs …). per_segment["label"]:
        float32, the class number or value that a head learns; NaN where there is none. per_segment["labels"]: [S, K]
        float32, 1 for each class that a row has, of the first K. per_segment["margin"]: float32, of preferred answers.
        per_segment["wanted"]: float32, 1 for an answer marked as good, 0 for a bad one, NaN for neither.
        per_segment["example"]: int64, the running number of the segment's example, -1 for a segment that only holds a
        prompt that others continue.
    """

    tokens_T: Tensor
    targets_T: Tensor
    weights_T: Tensor
    position_T: Tensor
    cu_seqlens: Tensor
    parent_S: Tensor
    group_S: Tensor
    last_S: Tensor
    source_S: Tensor
    noise_T: Tensor | None = None
    types_T: Tensor | None = None
    source: Source | None = None
    per_token: dict[str, Tensor] = field(default_factory=dict)
    per_segment: dict[str, Tensor] = field(default_factory=dict)
    per_group: dict[str, Tensor] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        return int(self.tokens_T.numel())

    @property
    def n_segments(self) -> int:
        return int(self.parent_S.numel())

    @property
    def n_groups(self) -> int:
        return int(self.group_S[-1]) + 1 if self.group_S.numel() else 0

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = {
            f.name: {k: v.to(device) for k, v in value.items()} if isinstance(value, dict) else value.to(device)
            for f in fields(self)
            for value in [getattr(self, f.name)]
            if value is not None
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Term:
    """One part of a loss. A step's loss is the sum over terms of coef * total / weight.

    total: scalar tensor, a sum over the batch (with gradient).
    weight: what the loop divides by, summed over micro-batches and ranks; known from the batch before the forward.
    coef: the term's factor in the loss.
    """

    total: Tensor
    weight: float
    coef: float = 1.0
