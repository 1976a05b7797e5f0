"""Proxy-tuning (Liu et al. 2024, arXiv 2401.08565): a small model's tuning steers a large one that stays as it is.

At every token: logits(large) + alpha * (logits(small, tuned) - logits(small)). The models must share one vocabulary.
"""

from __future__ import annotations

from pydantic import Field

from tunewright.engine.recipes.base import Card, RecipeOptions


class ProxyOptions(RecipeOptions):
    tuned: str = Field(min_length=1, description="the small model after tuning, an adapter over it for instance")
    small: str = Field(min_length=1, description="the small model before tuning")
    alpha: float = Field(1.0, ge=0, le=10, description="how far the difference moves the large model")


class Proxy:
    """A large model, moved at decoding by what tuning changed in a small one."""

    card = Card("proxy-tuning", does="combine", models=("tuned", "small"))
    Options = ProxyOptions
    encoder = None

    def __init__(self, options: ProxyOptions) -> None:
        self.options = options

    def weights(self) -> list[float]:
        """The factors of the logits of the model below, and of `card.models` in their order (equation 1)."""
        return [1.0, self.options.alpha, -self.options.alpha]
