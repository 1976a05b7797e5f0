"""L2-SP: what is trained is pulled back to where it started (Li et al. 2018, arXiv 1802.01483)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from tunewright.train.retain import base
from tunewright.train.retain.base import Given, RetainCard, pull_back, snapshot


class L2SP(base.Retain):
    """Adds coefficient / 2 * ||theta - theta_0||^2 over everything that is trained. Needs no data.

    The paper pulls the weights of a new head to zero, with a factor of their own; here to their first draw.
    """

    class Options(base.Options):
        coefficient: float = Field(0.1, gt=0, le=1e6, description="alpha of the paper")

    card: ClassVar[RetainCard] = RetainCard(title="L2-SP", rows="none", copies=1)

    def begin(self, given: Given) -> None:
        self._parameters, self._start = given.tuner.trainable(), snapshot(given.tuner)

    def pull(self) -> float:
        return pull_back(self._parameters, self._start, self.options.coefficient, None)
