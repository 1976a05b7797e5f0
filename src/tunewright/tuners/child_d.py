"""Child-tuning D: the weights that matter most to the task are trained, a fixed choice (arXiv 2109.05687)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from tunewright.tuners import base
from tunewright.tuners.base import TunerCard
from tunewright.tuners.entries import Entries


class ChildTuningD(Entries):
    """The top share of all weights by Fisher information on the job's rows is trained; the rest stays bit for bit.

    Xu et al. 2021, section 3.2, equation 5: gradients are masked to the child network, and not rescaled.
    """

    class Options(base.Options):
        share: float = Field(0.3, gt=0, le=1, description="of all weights, trained; the paper tries 0.1, 0.2 and 0.3")
        examples: int = Field(
            256, ge=1, le=1_000_000, description="rows that the Fisher information is measured on, before step 1"
        )

    card: ClassVar[TunerCard] = TunerCard(
        title="Child-tuning D",
        artefact="delta",
        mergeable=True,
        identity_at_start=True,
        works_on_nf4=False,
        default_lr=5e-5,
        float32_base=True,
        needs_data=True,
    )

    def count(self, n: int) -> int:
        return max(1, round(self.options.share * n))
