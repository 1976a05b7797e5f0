"""Learning-rate schedules: pure functions of the step, so they have no state. All begin with a linear warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field

from tunewright.train.optim.base import Card, Options

WARMUP = "share of all steps (below 1) or number of steps (1 and more) in which the rate rises linearly"
MIN_FACTOR = "what the rate falls to, as a share of the full one"


class Warmup(Options):
    warmup: float = Field(0.05, ge=0, description=WARMUP)

    def warm(self, step: int, total: int) -> tuple[float, float]:
        """(factor during warm-up or 1, progress 0..1 of what follows it). step: 1-based."""
        steps = min(as_steps(self.warmup, total), max(total - 1, 0))
        if step <= steps:
            return step / steps, 0.0
        return 1.0, (step - 1 - steps) / max(total - steps, 1)


def as_steps(value: float, total: int) -> int:
    """A share of all steps (below 1) or a number of steps (1 and more), in whole steps."""
    return math.ceil(value * total if value < 1 else value)


class Constant:
    """The full rate after warm-up."""

    class Options(Warmup):
        pass

    card: ClassVar[Card] = Card("Constant")

    @staticmethod
    def factor(step: int, total: int, options: Any) -> float:
        return options.warm(step, total)[0]


class Linear:
    """Falls linearly to `min_factor` of the rate."""

    class Options(Warmup):
        min_factor: float = Field(0.0, ge=0, le=1, description=MIN_FACTOR)

    card: ClassVar[Card] = Card("Linear")

    @staticmethod
    def factor(step: int, total: int, options: Any) -> float:
        warm, progress = options.warm(step, total)
        return warm * (1 - (1 - options.min_factor) * progress)


class Cosine:
    """Falls along half a cosine to `min_factor` of the rate (arXiv 1608.03983, without restarts)."""

    class Options(Warmup):
        min_factor: float = Field(0.0, ge=0, le=1, description=MIN_FACTOR)

    card: ClassVar[Card] = Card("Cosine")

    @staticmethod
    def factor(step: int, total: int, options: Any) -> float:
        warm, progress = options.warm(step, total)
        return warm * (options.min_factor + (1 - options.min_factor) * 0.5 * (1 + math.cos(math.pi * progress)))


# what is left of the way down (1 at the beginning, 0 at the end) after a share of the decay's steps
FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "sqrt": lambda done: 1 - math.sqrt(done),
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}


class WSD:
    """Warm-up, stable, decay (MiniCPM, arXiv 2404.06395, section 4.2): the full rate until the last steps, then a fall.

    How the rate falls: `sqrt` is 1 - sqrt, the best of those compared in arXiv 2405.18392 (section 3).
    """

    class Options(Warmup):
        decay: float = Field(
            0.1, ge=0, description="share of all steps (below 1) or number of steps (1 and more) of the fall"
        )
        fall: Literal["linear", "sqrt", "cosine"] = Field("sqrt", description="how the rate falls; sqrt is 1 - sqrt")
        min_factor: float = Field(0.0, ge=0, le=1, description=MIN_FACTOR)

    card: ClassVar[Card] = Card("Warm-up, stable, decay")

    @staticmethod
    def factor(step: int, total: int, options: Any) -> float:
        warm, _ = options.warm(step, total)
        falling = min(as_steps(options.decay, total), total)
        done = (step - 1 - (total - falling)) / max(falling, 1)
        left = FALLS[options.fall](max(done, 0.0))
        return warm * (options.min_factor + (1 - options.min_factor) * left)
