"""Optimizers and learning-rate schedules: two tables. An optimizer is built over named parameters; a schedule is a pure
function of the step."""

from tunewright.core.registry import Table

OPTIMIZERS = Table(
    "optimizer",
    {
        "adafactor": "tunewright.train.optim.adafactor:Adafactor",
        "adamw": "tunewright.train.optim.adamw:AdamW",
        "adamw8bit": "tunewright.train.optim.adamw:AdamW8bit",
        "lion": "tunewright.train.optim.lion:Lion",
        "muon": "tunewright.train.optim.muon:Muon",
        "sgd": "tunewright.train.optim.sgd:SGD",
    },
)
SCHEDULES = Table(
    "schedule",
    {
        "constant": "tunewright.train.optim.schedules:Constant",
        "cosine": "tunewright.train.optim.schedules:Cosine",
        "linear": "tunewright.train.optim.schedules:Linear",
        "wsd": "tunewright.train.optim.schedules:WSD",
    },
)
