"""Rows with labels and rows for encoder-decoders: the ids of transformers' tokenizers, and nothing cut silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import tiny
from tunewright.core.conversation import Conversation
from tunewright.core.errors import DataError
from tunewright.core.example import Example
from tunewright.data.formats import FORMATS
from tunewright.data.formats.detect import decide
from tunewright.data.render import RenderReport, render_rows
from tunewright.data.sides import class_names
from tunewright.data.tokenizer import Tokenizer

PAIR = {"text": "the sky is blue", "text_pair": "Are you sure?", "label": "yes"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_reader(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_reader(tmp_path_factory.mktemp("t5"), "t5")


def row(format: str, fields: dict[str, Any], line: int = 1) -> Conversation:
    return FORMATS.load(format).convert(fields, line)


def examples(rows: list[Conversation], folder: Path, **options: Any) -> list[Example]:
    tokenizer = Tokenizer.load(folder)
    groups = render_rows(rows, tokenizer, **{"max_length": 1000, "report": RenderReport(), **options})
    return [e for g in groups for e in g.examples]


def test_labelled_rows_are_what_transformers_makes_of_them(bert: Path) -> None:
    single, pair = examples(
        [row("text_label", {"text": "a leaf is green", "label": "no"}), row("text_label", PAIR, 2)],
        bert,
        shape="labelled",
        labels=("no", "yes"),
    )
    theirs = AutoTokenizer.from_pretrained(bert)
    assert list(single.ids) == theirs("a leaf is green")["input_ids"]
    assert list(pair.ids) == theirs(PAIR["text"], PAIR["text_pair"])["input_ids"]
    split = list(pair.ids).index(theirs.sep_token_id) + 1
    assert single.types == () and pair.types == (0,) * split + (1,) * (len(pair.ids) - split)
    assert (single.label, pair.label) == (0.0, 1.0)
    assert not any(pair.weights)


def test_a_decoder_reads_a_pair_as_two_lines(tiny_model_dir: Path) -> None:
    (example,) = examples([row("text_label", PAIR)], tiny_model_dir, shape="labelled", labels=("no", "yes"))
    assert Tokenizer.load(tiny_model_dir).decode(list(example.ids)) == "the sky is blue\nAre you sure?"
    assert example.types == ()


@pytest.mark.parametrize(
    ("label", "text"), [("red", "red"), (" red ", "red"), (1, "1"), (2.0, "2"), (0.5, "0.5"), (True, "true")]
)
def test_labels_become_text(label: Any, text: str) -> None:
    assert row("text_label", {"text": "x", "label": label}).label == text


@pytest.mark.parametrize("label", [None, "", {}, float("nan"), [1, ""], ["a", "a"]])
def test_a_label_that_is_none_is_a_problem_of_the_row(label: Any) -> None:
    with pytest.raises(DataError, match="label") as e:
        row("text_label", {"text": "x", "label": label}, 7)
    assert e.value.problems[0].line == 7


def test_rows_with_labels_are_recognised_and_plain_text_still_is() -> None:
    names = [found.format.name for found in (decide([["text", "label"]]), decide([["text"]])) if found.format]
    assert names == ["text_label", "text"]
    assert row("text", {"text": "x"}).shape == "text"


def test_classes_in_order() -> None:
    assert class_names({"10", "9", "-1", "0.5"}) == ("-1", "0.5", "9", "10")
    assert class_names({"b", "10", "a"}) == ("10", "a", "b")


def test_values(bert: Path) -> None:
    rows = [row("text_label", {"text": "x", "label": v}) for v in (3, "4.5")]
    assert [e.label for e in examples(rows, bert, shape="labelled")] == [3.0, 4.5]
    with pytest.raises(DataError, match="needs a number"):
        examples([row("text_label", {"text": "x", "label": "good"})], bert, shape="labelled")


def test_an_unknown_class_names_the_row_and_the_nearest(bert: Path) -> None:
    with pytest.raises(DataError, match=r"line 3.*'gren'.*Did you mean 'green'"):
        examples(
            [row("text_label", {"text": "x", "label": "gren"}, 3)], bert, shape="labelled", labels=("green", "red")
        )


def test_a_long_row_keeps_the_tokens_that_end_it(bert: Path) -> None:
    rows = [row("text_label", {"text": "the sky is blue " * 9, "label": "a"})]
    (cut,) = examples(rows, bert, shape="labelled", labels=("a", "b"), max_length=8, overlong="truncate")
    theirs = AutoTokenizer.from_pretrained(bert)
    assert list(cut.ids) == theirs(rows[0].text, truncation=True, max_length=8)["input_ids"]
    with pytest.raises(DataError, match="longer than the limit of 8"):
        examples(rows, bert, shape="labelled", labels=("a", "b"), max_length=8)


def test_an_encoder_decoder_reads_the_prompt_and_writes_the_answer(t5: Path) -> None:
    (example,) = examples([row("prompt_completion", {"prompt": "the sky?", "completion": "It is blue."})], t5)
    theirs = AutoTokenizer.from_pretrained(t5)
    assert list(example.source_ids) == theirs("the sky?")["input_ids"]
    assert list(example.ids) == [0, *theirs("It is blue.")["input_ids"]]  # decoder_start_token_id, then the labels
    assert example.weights == (0.0, *[1.0] * (len(example.ids) - 1))
    assert example.n_tokens == len(example.ids) + len(example.source_ids)


def test_every_trained_turn_of_a_chat_is_a_target(t5: Path) -> None:
    chat = row("openai_chat", tiny.sft_rows(3)[2])
    first, second = examples([chat], t5)
    tokenizer = Tokenizer.load(t5)
    texts = [m.content or "" for m in chat.messages]
    assert tokenizer.decode(list(first.source_ids)) == "\n".join(texts[:2])
    assert tokenizer.decode(list(second.source_ids)) == "\n".join(texts[:4])
    assert tokenizer.decode(list(second.ids[1:])) == texts[4]
    assert len(examples([chat], t5, train_on="last")) == 1


def test_what_an_encoder_decoder_cannot_read_is_refused(t5: Path) -> None:
    with pytest.raises(DataError, match="needs a prompt and an answer"):
        examples([row("text", {"text": "Once upon a time"})], t5, shape="text")
    with pytest.raises(DataError, match="begins with the answer"):
        examples([row("openai_chat", {"messages": [{"role": "assistant", "content": "Hi"}]})], t5)


def test_both_sides_have_a_limit(t5: Path) -> None:
    rows = [row("prompt_completion", {"prompt": "the sky " * 30, "completion": "blue"})]
    with pytest.raises(DataError, match="longer than the limit of 20"):
        examples(rows, t5, max_length=20)
    (cut,) = examples(rows, t5, max_length=20, overlong="truncate")
    assert len(cut.source_ids) == 20 and cut.source_ids[-1] == Tokenizer.load(t5).eos_id
