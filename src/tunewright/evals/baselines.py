"""What a tuned model must beat: guessing the most frequent label, and counting words (TF-IDF + logistic regression)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tunewright.evals.task import Scorecard, score_labels
from tunewright.metrics.accuracy import majority

MAJORITY, TFIDF = "majority class", "TF-IDF + logistic"
Labels = Mapping[str, Sequence[str]]  # label field -> [N] labels


def majority_labels(train_labels: Sequence[str], n: int) -> list[str]:
    """[n] times the most frequent training label."""
    return [majority(train_labels)] * n


def tfidf_labels(train_texts: Sequence[str], train_labels: Sequence[str], texts: Sequence[str]) -> list[str]:
    """[len(texts)] labels by logistic regression on TF-IDF of words and word pairs.

    sublinear tf and C=10 are the usual strong settings for short texts; the fit is deterministic.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = LogisticRegression(C=10.0, max_iter=2000)
    model.fit(vectorizer.fit_transform(train_texts), list(train_labels))
    return [str(label) for label in model.predict(vectorizer.transform(texts))]


def baseline_cards(texts: Sequence[str], known: Labels, asked: Sequence[str], wanted: Labels) -> list[Scorecard]:
    """Both systems, trained on `texts` with the labels `known`, on the texts `asked`, whose labels are `wanted`."""
    guess = {field: majority_labels(labels, len(asked)) for field, labels in known.items()}
    counted = {field: tfidf_labels(texts, labels, asked) for field, labels in known.items()}
    return [score_labels(MAJORITY, guess, wanted), score_labels(TFIDF, counted, wanted)]
