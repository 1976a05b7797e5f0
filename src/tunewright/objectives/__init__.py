"""TOWARD WHAT a model is trained: one file a loss, one line here."""

from tunewright.core.registry import Table

OBJECTIVES = Table(
    "objective",
    {
        "classify": "tunewright.objectives.classify:Classify",
        "cpo": "tunewright.objectives.cpo:CPO",
        "dpo": "tunewright.objectives.dpo:DPO",
        "kto": "tunewright.objectives.kto:KTO",
        "orpo": "tunewright.objectives.orpo:ORPO",
        "regress": "tunewright.objectives.classify:Regress",
        "sft": "tunewright.objectives.sft:SFT",
        "simpo": "tunewright.objectives.simpo:SimPO",
    },
)
