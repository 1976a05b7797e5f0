"""WHAT is trained: one file a method, one line here."""

from tunewright.core.registry import Table

TUNERS = Table(
    "tuner",
    {
        "full": "tunewright.tuners.full:Full",
        "lora": "tunewright.tuners.lora:LoRA",
    },
)
