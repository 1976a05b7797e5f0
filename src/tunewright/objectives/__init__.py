"""TOWARD WHAT a model is trained: one file a loss, one line here."""

from tunewright.core.registry import Table

OBJECTIVES = Table(
    "objective",
    {
        "answers": "tunewright.objectives.answers:Answers",
        "classify": "tunewright.objectives.classify:Classify",
        "distill": "tunewright.objectives.distill:Distill",
        "multilabel": "tunewright.objectives.multilabel:Multilabel",
        "pretrain": "tunewright.objectives.pretrain:Pretrain",
        "regress": "tunewright.objectives.regress:Regress",
        "reward": "tunewright.objectives.reward:Reward",
        "sft": "tunewright.objectives.sft:SFT",
    },
)
