"""How good an answer is, in OpenAI's words: one file a type, one line here. Read them with base.parse_grader."""

from tunewright.core.registry import Table

GRADERS = Table(
    "grader",
    {
        "label_model": "tunewright.graders.label_model:LabelModel",
        "multi": "tunewright.graders.multi:Multi",
        "python": "tunewright.graders.python:Python",
        "score_model": "tunewright.graders.score_model:ScoreModel",
        "string_check": "tunewright.graders.string_check:StringCheck",
        "text_similarity": "tunewright.graders.text_similarity:TextSimilarity",
    },
)
