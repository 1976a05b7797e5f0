"""How rows are written: one file a format, one line here. Every format becomes core's Conversation."""

from tunewright.core.registry import Table

FORMATS = Table(
    "format",
    {
        "openai_chat": "tunewright.data.formats.openai_chat:FORMAT",
        "openai_dpo": "tunewright.data.formats.openai_dpo:FORMAT",
        "chosen_rejected": "tunewright.data.formats.chosen_rejected:FORMAT",
        "alpaca": "tunewright.data.formats.alpaca:FORMAT",
        "sharegpt": "tunewright.data.formats.sharegpt:FORMAT",
        "prompt_completion": "tunewright.data.formats.prompt_completion:FORMAT",
        "unpaired": "tunewright.data.formats.unpaired:FORMAT",
        "prompt": "tunewright.data.formats.prompt:FORMAT",
        "reinforcement": "tunewright.data.formats.reinforcement:FORMAT",
        "text_label": "tunewright.data.formats.text_label:FORMAT",
        "text": "tunewright.data.formats.text:FORMAT",
    },
)
