"""FishMask: the k weights with the largest Fisher information are trained (Sung et al. 2021, arXiv 2111.09839)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from tunewright.tuners import base
from tunewright.tuners.base import TunerCard
from tunewright.tuners.entries import Entries


class FishMask(Entries):
    """Exactly k entries change, chosen before step 1 by the empirical Fisher information on some rows (equation 4)."""

    class Options(base.Options):
        share: float = Field(0.005, gt=0, le=1, description="of all weights, trained; the paper's standard is 0.005")
        k: int | None = Field(None, ge=1, description="the number of weights to train, instead of a share")
        examples: int = Field(
            256, ge=1, le=1_000_000, description="rows that the Fisher information is measured on, before step 1"
        )

    card: ClassVar[TunerCard] = TunerCard(
        title="FishMask",
        artefact="delta",
        mergeable=True,
        identity_at_start=True,
        works_on_nf4=False,
        default_lr=3e-4,
        float32_base=True,
        needs_data=True,
    )

    def count(self, n: int) -> int:
        k = self.options.k
        return min(n, max(1, round(self.options.share * n)) if k is None else k)
