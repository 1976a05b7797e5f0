"""TOWARD WHAT a model is trained: one file a loss, one line here."""

from tunewright.core.registry import Table

OBJECTIVES = Table(
    "objective",
    {
        "classify": "tunewright.objectives.classify:Classify",
        "regress": "tunewright.objectives.classify:Regress",
        "sft": "tunewright.objectives.sft:SFT",
    },
)
