"""Example and Group: token ids with a loss weight per token, and the examples that must stay together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One token sequence.

    ids: [T] token ids.
    weights: [T] loss weight of each token as a target (0 = not trained). weights[0] is never used: nothing predicts it.
    source: the row's 1-based number in its file.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    source: int = 0

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.weights):
            raise ValueError(f"an example has {len(self.ids)} ids and {len(self.weights)} weights")


@dataclass(frozen=True)
class Group:
    """Examples that stay in one step: 1 for SFT, 2 (preferred, rejected) for preferences, G rollouts for GRPO.

    prefix: how many leading tokens all examples share (a shared prompt), 0 if unknown.
    """

    examples: tuple[Example, ...]
    prefix: int = 0

    @property
    def n_tokens(self) -> int:
        return sum(len(e.ids) for e in self.examples)
