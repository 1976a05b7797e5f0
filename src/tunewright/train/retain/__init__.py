"""Against forgetting: what holds a model to what it could before. One file a method, one line here."""

from tunewright.core.registry import Table

RETAIN = Table(
    "retain",
    {
        "replay": "tunewright.train.retain.replay:Replay",
        "ewc": "tunewright.train.retain.ewc:EWC",
        "l2sp": "tunewright.train.retain.l2sp:L2SP",
        "kl": "tunewright.train.retain.kl:KL",
    },
)
