"""Groups with a common prompt -> a Batch in which the prompt is computed once and the answers branch off it.

The prompt is a segment of its own without targets. Each answer is a segment that begins with a copy of the prompt's
last token (so that its first target has a predecessor), continues the prompt's positions and sees the prompt through
`parent_S`. Every original target keeps its token, its weight and the tokens that it depends on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from tunewright.core.example import Example, Group
from tunewright.ops.extras import Numbers, numbers, of_targets
from tunewright.ops.types import Batch


@dataclass(frozen=True)
class Segment:
    """ids: tokens. weights: of what each token predicts. start: position of the first. example: its number or -1.
    per_token: of the tokens themselves."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    source: int
    group: int
    start: int = 0
    parent: int = -1
    example: int = -1
    wanted: bool | None = None
    per_token: Numbers | None = None


def share_prefixes(groups: Sequence[Group]) -> Batch:
    """One Batch of all groups, in order, a group's prompt before its answers; groups that share nothing stay whole.

    per_segment["example"]: [S] int64, the running number of the segment's example over all groups, -1 for a prompt.
    Raises ValueError for examples with labels, token types or source ids: those models do not share prefixes.
    """
    segments: list[Segment] = []
    n = 0
    for g, group in enumerate(groups):
        if any(e.is_labelled or e.types or e.source_ids for e in group.examples):
            raise ValueError("only plain decoder rows can share a prefix")
        shared = group.prefix if is_shared(group) else 0
        parent = len(segments) if shared else -1
        if shared:
            prompt = group.examples[0]
            segments.append(Segment(prompt.ids[:shared], (0.0,) * shared, prompt.source, g))
        for example in group.examples:
            segments.append(_branch(example, g, shared, parent, n))
            n += 1
    return _with_margins(_batch(segments), [e for group in groups for e in group.examples])


def _with_margins(batch: Batch, examples: Sequence[Example]) -> Batch:
    """The batch with per_segment["margin"], if an example has one."""
    if all(e.margin is None for e in examples):
        return batch
    margin_N, at_S = numbers(examples, "margin"), batch.per_segment["example"]
    margin_S = torch.where(at_S < 0, torch.nan, margin_N[at_S])
    return replace(batch, per_segment={**batch.per_segment, "margin": margin_S})


def is_shared(group: Group) -> bool:
    """Whether sharing the group's prompt saves anything and loses nothing: two examples, no target in the prompt."""
    p = group.prefix
    return p > 1 and len(group.examples) > 1 and not any(w for e in group.examples for w in e.weights[1:p])


def n_tokens(group: Group) -> int:
    """Tokens that the group takes in a batch of share_prefixes()."""
    if not is_shared(group):
        return group.n_tokens
    return group.prefix + sum(len(e.ids) - group.prefix + 1 for e in group.examples)


def _branch(example: Example, group: int, shared: int, parent: int, number: int) -> Segment:
    start = max(shared - 1, 0)
    weights = (*example.weights[start + 1 :], 0.0)
    more = example.per_token and {name: values[start:] for name, values in example.per_token.items()}
    return Segment(example.ids[start:], weights, example.source, group, start, parent, number, example.wanted, more)


def _batch(segments: Sequence[Segment]) -> Batch:
    ends = list(accumulate(len(s.ids) for s in segments))

    def per_token(values: list[list[int]]) -> torch.Tensor:
        return torch.tensor([v for row in values for v in row], dtype=torch.int64)

    def per_segment(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64)

    marked = {} if all(s.wanted is None for s in segments) else {"wanted": numbers(segments, "wanted")}

    return Batch(
        tokens_T=per_token([list(s.ids) for s in segments]),
        targets_T=per_token([[*s.ids[1:], 0] for s in segments]),
        weights_T=torch.tensor([w for s in segments for w in s.weights], dtype=torch.float32),
        position_T=per_token([list(range(s.start, s.start + len(s.ids))) for s in segments]),
        cu_seqlens=torch.tensor([0, *ends], dtype=torch.int32),
        parent_S=per_segment([s.parent for s in segments]),
        group_S=per_segment([s.group for s in segments]),
        last_S=per_segment(ends) - 1,
        source_S=per_segment([s.source for s in segments]),
        per_token=of_targets([s.per_token for s in segments], [len(s.ids) for s in segments]),
        per_segment={"example": per_segment([s.example for s in segments]), **marked},
    )
