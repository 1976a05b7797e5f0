"""Writes similarity_oracle.json: what rapidfuzz, nltk, rouge-score and sacrebleu make of the pairs and words below.

Run it in an environment with these four packages; the tests only read the file: `python similarity_oracle.py`.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import nltk
import rapidfuzz
import sacrebleu
from nltk.stem import PorterStemmer
from nltk.translate.gleu_score import sentence_gleu
from nltk.translate.meteor_score import meteor_score
from rapidfuzz import fuzz
from rouge_score import rouge_scorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

HERE = Path(__file__).parent
ROUGES = ("rouge1", "rouge2", "rouge3", "rouge4", "rouge5", "rougeL")
SENTENCES = [
    "It is a guide to action which ensures that the military always obeys the commands of the party.",
    "It is the guiding principle which guarantees the military forces always being under the command of the Party.",
    "The cat sat on the mat.",
    "There is a cat on the mat, and it's sleeping (soundly).",
    'He paid $1,234.56 on 2024-11-05 for "state-of-the-art" tools; 50% off!',
    "Patients with mild fever &amp; cough should rest; call the clinic if it lasts more than 3 days...",
    "A hyphen at the end of a line is join-\ned, a newline\nis not. Tabs\tare spaces.",
    "Generalizations of relational databases conditionally motivated the engineers' hopping ponies.",
    "one",
    "the the the the the the the",
    "",
    "  ",
    "?!",
]
EXTRA = [("naïve café", "naive cafe"), ("Ünïcode", "ünïcode"), ("a b c d e f g h", "h g f e d c b a"), ("aXbXc", "abc")]
# of Porter's own examples, and where his rules are easily got wrong
WORDS = {
    "caresses", "ponies", "ties", "caress", "cats", "feed", "agreed", "plastered", "bled", "motoring", "sing",
    "conflated", "troubled", "sized", "hopping", "tanned", "falling", "hissing", "fizzed", "failing", "filing",
    "happy", "sky", "relational", "conditional", "rational", "valenci", "hesitanci", "digitizer", "conformabli",
    "radicalli", "differentli", "vileli", "analogousli", "vietnamization", "predication", "operator",
    "feudalism", "decisiveness", "hopefulness", "callousness", "formaliti", "sensitiviti", "sensibiliti",
    "triplicate", "formative", "formalize", "electriciti", "electrical", "hopeful", "goodness", "revival",
    "allowance", "inference", "airliner", "gyroscopic", "adjustable", "defensible", "irritant", "replacement",
    "adjustment", "dependent", "adoption", "homologou", "communism", "activate", "angulariti", "homologous",
    "effective", "bowdlerize", "probate", "rate", "cease", "controll", "roll", "yes", "y", "by", "syzygy",
    "oed", "eed", "ing", "eing", "ed", "being", "seeing", "aeed", "bees", "lily", "dying", "lying", "ion",
    "lion", "nation", "passion", "mission", "abys", "iness", "ational",
}  # fmt: skip


def pairs() -> list[tuple[str, str]]:
    """Every sentence with some others, and with its own words changed, dropped and moved."""
    draw = random.Random(7)
    found = [(a, b) for a in SENTENCES for b in draw.sample(SENTENCES, 4)] + EXTRA
    for sentence in SENTENCES[:8]:
        words = sentence.split(" ")
        for _ in range(3):
            changed = [w for w in words if draw.random() > 0.2]
            draw.shuffle(changed) if draw.random() < 0.4 else None
            found.append((" ".join([*changed, *draw.sample(words, 1)]), sentence))
    return found


class NoSynonyms:
    def synsets(self, word: str) -> list[Any]:
        return []


def measure(text: str, reference: str, stemmer: PorterStemmer) -> dict[str, float]:
    said, wanted = Tokenizer13a()(text).split(), Tokenizer13a()(reference).split()
    words = [re.findall(r"[^\W_]+", t.lower()) for t in (reference, text)]
    rouge = rouge_scorer.RougeScorer(ROUGES).score(reference, text)
    return {
        "fuzzy_match": fuzz.ratio(text, reference) / 100,
        "bleu": sacrebleu.sentence_bleu(text, [reference]).score / 100,
        "gleu": sentence_gleu([wanted], said),
        "meteor": meteor_score(words[:1], words[1], stemmer=stemmer, wordnet=NoSynonyms()) if all(words) else 0.0,
        **{re.sub(r"rouge(.)", lambda m: f"rouge_{m[1].lower()}", k): v.fmeasure for k, v in rouge.items()},
    }


def main() -> None:
    stemmer = PorterStemmer(mode=PorterStemmer.ORIGINAL_ALGORITHM)
    readme = (HERE.parents[1] / "docs" / "objectives.md").read_text(encoding="utf-8")
    words = sorted({*WORDS, *re.findall(r"[a-z]{3,}", readme.lower())})
    versions = {m.__name__: m.__version__ for m in (nltk, rapidfuzz, sacrebleu)}
    told = {
        "versions": versions,
        "pairs": [{"text": a, "reference": b, **measure(a, b, stemmer)} for a, b in pairs()],
        "stems": {w: stemmer.stem(w, to_lowercase=False) for w in words},
    }
    (HERE / "similarity_oracle.json").write_text(json.dumps(told, indent=0, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
