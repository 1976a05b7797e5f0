"""TOWARD WHAT a model is trained: one file a loss, one line here."""

from tunewright.core.registry import Table

OBJECTIVES = Table(
    "objective",
    {
        "answers": "tunewright.objectives.answers:Answers",
        "classify": "tunewright.objectives.classify:Classify",
        "cpo": "tunewright.objectives.cpo:CPO",
        "distill": "tunewright.objectives.distill:Distill",
        "dpo": "tunewright.objectives.dpo:DPO",
        "grpo": "tunewright.objectives.grpo:GRPO",
        "kto": "tunewright.objectives.kto:KTO",
        "multilabel": "tunewright.objectives.multilabel:Multilabel",
        "orpo": "tunewright.objectives.orpo:ORPO",
        "ppo": "tunewright.objectives.ppo:PPO",
        "pretrain": "tunewright.objectives.pretrain:Pretrain",
        "regress": "tunewright.objectives.regress:Regress",
        "reward": "tunewright.objectives.reward:Reward",
        "rlaif": "tunewright.objectives.rlaif:RLAIF",
        "rloo": "tunewright.objectives.rloo:RLOO",
        "sft": "tunewright.objectives.sft:SFT",
        "simpo": "tunewright.objectives.simpo:SimPO",
    },
)
