"""How good an answer is, in OpenAI's words: one file a type, one line here. Read them with base.parse_grader."""

from tunewright.core.registry import Table

GRADERS = Table(
    "grader",
    {
        "string_check": "tunewright.graders.string_check:StringCheck",
    },
)
