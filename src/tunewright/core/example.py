"""Example and Group: token ids with a loss weight per token, and the examples that must stay together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One token sequence.

    ids: [T] token ids (an encoder-decoder's target, from its start token on).
    weights: [T] loss weight of each token as a target (0 = not trained). weights[0] is never used: nothing predicts it.
    source: the row's 1-based number in its file.
    source_ids: what an encoder-decoder reads; empty for every other model.
    types: [T] which text of a pair each token belongs to (0 or 1), or empty: all 0.
    label: the class number or the value that a head learns for the whole row, or None.
    wanted: whether somebody marked the answer as good, or None where nobody did (pairs, supervised rows).
    labels: the numbers of all classes of a row that may have several, or none of them; None if it is no such row.
    margin: of a preferred answer: by how much its reward is to exceed the other's; None is 0.
    item: of a prompt that is to be answered and graded: what graders know of the row, as JSON.
    per_token: {name: [T]}, further numbers of each token as a target (advantages, old log-probabilities), or None.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    source: int = 0
    source_ids: tuple[int, ...] = ()
    types: tuple[int, ...] = ()
    label: float | None = None
    wanted: bool | None = None
    labels: tuple[int, ...] | None = None
    margin: float | None = None
    item: str | None = None
    per_token: dict[str, tuple[float, ...]] | None = None

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.weights):
            raise ValueError(f"an example has {len(self.ids)} ids and {len(self.weights)} weights")
        if self.types and len(self.types) != len(self.ids):
            raise ValueError(f"an example has {len(self.ids)} ids and {len(self.types)} types")
        for name, values in (self.per_token or {}).items():
            if len(values) != len(self.ids):
                raise ValueError(f"an example has {len(self.ids)} ids and {len(values)} values of {name}")

    @property
    def is_labelled(self) -> bool:
        """Whether a head learns something from the row as a whole."""
        return self.label is not None or self.labels is not None

    @property
    def n_tokens(self) -> int:
        """Tokens to compute, both sides together."""
        return len(self.ids) + len(self.source_ids)


@dataclass(frozen=True)
class Group:
    """Examples that stay in one step: 1 for SFT, 2 (preferred, rejected) for preferences, G rollouts for GRPO.

    prefix: how many leading tokens all examples share (a shared prompt), 0 if unknown.
    """

    examples: tuple[Example, ...]
    prefix: int = 0

    @property
    def n_tokens(self) -> int:
        return sum(e.n_tokens for e in self.examples)
