"""text_similarity against the packages that define its metrics (similarity_oracle.py wrote their numbers)."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, get_args

import pytest

from tunewright.graders.base import Sample, parse_grader
from tunewright.graders.similarity import METRICS, bleu, common, meteor, rouge_l, tokens_13a, words
from tunewright.graders.stems import stem
from tunewright.graders.text_similarity import TextSimilarity

ORACLE: dict[str, Any] = json.loads(Path(__file__).with_name("similarity_oracle.json").read_text(encoding="utf-8"))
ASCII = [p for p in ORACLE["pairs"] if (p["text"] + p["reference"]).isascii()]


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_agree_with_their_packages(metric: str) -> None:
    # rouge-score leaves out every letter beyond ASCII; we do not
    rows = ASCII if metric.startswith("rouge") else ORACLE["pairs"]
    assert len(rows) > 60 and len({p[metric] for p in rows}) > 8
    for p in rows:
        assert METRICS[metric](p["text"], p["reference"]) == pytest.approx(p[metric], rel=1e-9, abs=1e-12), p


def test_stems_agree_with_porters() -> None:
    assert len(ORACLE["stems"]) > 500
    assert {w: stem(w) for w in ORACLE["stems"]} == ORACLE["stems"]


def test_the_grader_has_every_metric() -> None:
    assert set(get_args(TextSimilarity.Options.model_fields["evaluation_metric"].annotation)) == set(METRICS)
    spec = {"type": "text_similarity", "name": "t", "input": "{{ sample.output_text }}", "reference": "{{ item.r }}"}
    for metric in METRICS:
        found = parse_grader({**spec, "evaluation_metric": metric}).grade({"r": "a fine day"}, Sample("a fine day"))
        expected = METRICS[metric]("a fine day", "a fine day")
        assert (found.reward, found.ok) == (expected, True)
    assert METRICS["fuzzy_match"]("", "") == 1.0


def test_published_examples() -> None:
    """Lin 2004, section 3; Papineni 2002, section 2.1: clipped counts."""
    assert rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(2 / 4)
    assert METRICS["rouge_1"]("the " * 7, "the cat is on the mat") == pytest.approx(2 * 2 / (7 + 6))
    assert meteor("a b c", "a b c") == pytest.approx(1 - 0.5 / 27)
    assert bleu("the cat", "the cat") == 1.0


def test_languages_without_spaces() -> None:
    assert words("今天天气很好 fine") == ["今", "天", "天", "气", "很", "好", "fine"]
    assert rouge_l("今天天气很好", "今天天气不好") == pytest.approx(5 / 6)
    assert tokens_13a("Straße 5, Größe 3.5") == ["Straße", "5", ",", "Größe", "3.5"]


def test_the_longest_common_subsequence() -> None:
    def table(a: str, b: str) -> int:
        rows = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a, 1):
            for j, y in enumerate(b, 1):
                rows[i][j] = rows[i - 1][j - 1] + 1 if x == y else max(rows[i - 1][j], rows[i][j - 1])
        return rows[-1][-1]

    draw = random.Random(1)
    for _ in range(200):
        a, b = ("".join(draw.choices("abc", k=draw.randrange(40))) for _ in range(2))
        assert common(a, b) == table(a, b)
