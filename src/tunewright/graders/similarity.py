"""How alike two texts are, from 0 to 1, by published formulas: one function a metric, one line in the table."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import pairwise

from tunewright.graders.stems import stem

ORDER = 4  # the longest n-grams of BLEU and GLEU
# of Chinese and Japanese each character is a word of its own
_ALONE = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")
# the rules of mteval-v13a, WMT's scorer
_ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
_APART = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def fuzzy_match(text: str, reference: str) -> float:
    """2 LCS / (sum of both lengths), in characters: the normalised InDel similarity, rapidfuzz's `fuzz.ratio`."""
    both = len(text) + len(reference)
    return 2 * common(text, reference) / both if both else 1.0


def bleu(text: str, reference: str) -> float:
    """BLEU of one sentence (Papineni et al. 2002), 13a tokens; n-grams that never match are smoothed exponentially
    (Chen & Cherry 2014, method 3), orders that the text is too short for left out."""
    said, wanted = tokens_13a(text), tokens_13a(reference)
    if not (Counter(said) & Counter(wanted)):
        return 0.0
    logs, halved = [], 1.0
    for n in range(1, min(ORDER, len(said)) + 1):
        ours = ngrams(said, n)
        matched = (ours & ngrams(wanted, n)).total()
        halved = halved if matched else halved * 2
        logs.append(math.log((matched or 1 / halved) / ours.total()))
    brevity = min(1.0, math.exp(1 - len(wanted) / len(said)))
    return brevity * math.exp(sum(logs) / len(logs))


def gleu(text: str, reference: str) -> float:
    """GLEU (Wu et al. 2016, arXiv 1609.08144, section 4.3): matching n-grams of 1 to 4 over those of the longer."""
    ours, theirs = (sum((ngrams(tokens_13a(t), n) for n in range(1, ORDER + 1)), Counter()) for t in (text, reference))
    return (ours & theirs).total() / max(ours.total(), theirs.total(), 1)


def meteor(text: str, reference: str) -> float:
    """METEOR (Banerjee & Lavie 2005; alpha 0.9, beta 3, gamma 0.5) over equal words and equal stems, no synonyms."""
    said, wanted = words(text), words(reference)
    pairs = _align(said, wanted)
    if not pairs:
        return 0.0
    precision, recall = len(pairs) / len(said), len(pairs) / len(wanted)
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    chunks = 1 + sum((b[0] - a[0], b[1] - a[1]) != (1, 1) for a, b in pairwise(pairs))
    return mean * (1 - 0.5 * (chunks / len(pairs)) ** 3)


def _align(said: list[str], wanted: list[str]) -> list[tuple[int, int]]:
    """Pairs of places, by place in `said`: first equal words, then equal stems, each from the end."""
    left, right, pairs = list(range(len(said))), list(range(len(wanted))), []
    for key in (str, stem):
        places: dict[str, list[int]] = {}
        for j in right:
            places.setdefault(key(wanted[j]), []).append(j)
        found = [(i, places[k].pop()) for i in reversed(left) if places.get(k := key(said[i]))]
        pairs += found
        left = [i for i in left if i not in {i for i, _ in found}]
        right = [j for j in right if j not in {j for _, j in found}]
    return sorted(pairs)


def rouge_n(text: str, reference: str, n: int) -> float:
    """ROUGE-N (Lin 2004) as F1 of matching n-grams of words in lower case."""
    ours, theirs = (ngrams(words(t), n) for t in (text, reference))
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L (Lin 2004) as F1 of the longest common subsequence of words in lower case."""
    ours, theirs = words(text), words(reference)
    return _f1(common(ours, theirs), len(ours), len(theirs))


METRICS: dict[str, Callable[[str, str], float]] = {
    "fuzzy_match": fuzzy_match,
    "bleu": bleu,
    "gleu": gleu,
    "meteor": meteor,
    **{f"rouge_{n}": partial(rouge_n, n=n) for n in range(1, 6)},
    "rouge_l": rouge_l,
}


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def tokens_13a(text: str) -> list[str]:
    """Words and marks as mteval-v13a tells them apart."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for written, meant in _ENTITIES.items():
        text = text.replace(written, meant)
    text = f" {text} "
    for pattern, apart in _APART:
        text = pattern.sub(apart, text)
    return text.split()


def ngrams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def common(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, a row at a time in the bits of one number (Hyyrö 2004)."""
    places: dict[Hashable, int] = {}
    for i, x in enumerate(a):
        places[x] = places.get(x, 0) | 1 << i
    full = row = (1 << len(a)) - 1
    for y in b:
        hit = row & places.get(y, 0)
        row = ((row + hit) | (row - hit)) & full
    return len(a) - row.bit_count()


def _f1(matched: int, ours: int, theirs: int) -> float:
    return 2 * matched / (ours + theirs) if matched else 0.0
