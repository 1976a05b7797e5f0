"""Whole jobs with a head or an encoder-decoder: from the data file to a result that opens in transformers and peft."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from job_kit import checked
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

import tiny
from tunewright.core.errors import DataError, SpecError, UserError
from tunewright.core.events import EventWriter
from tunewright.core.home import Home
from tunewright.core.run import Run, read_artefact
from tunewright.core.spec import parse_spec
from tunewright.engine.artefacts import Artefacts, Limits
from tunewright.jobs.prepare import create_run
from tunewright.train.run import run_job

COLOURS = ("blue", "green", "red")


def run(home: Home, rows: list[dict[str, Any]], **spec: Any) -> tuple[Run, dict[str, Any]]:
    """A job over `rows`, validated on the first of them, in this process; returns its run and the end event's data."""
    train = tiny.write_rows(home.root / "train.jsonl", rows)
    valid = tiny.write_rows(home.root / "valid.jsonl", rows[:9])
    fields = {"training_file": str(train), "validation_file": str(valid), "dtype": "float32", "threads": 1, "seed": 1}
    made = create_run(
        home, parse_spec({**fields, "n_epochs": 8, "batch_size": 6, **spec}), train_path=train, validation_path=valid
    )
    events = EventWriter(made.attempt(1) / "events.jsonl", 1)
    end = run_job(made, home, events, lambda: False)
    events.close()
    return made, end


@pytest.fixture
def readers(home: Home) -> Home:
    """A data folder with a tiny BERT and a tiny T5."""
    for family in ("bert", "t5"):
        tiny.build_reader(home.models / family, family)
    return home


@pytest.mark.parametrize("tuner", [pytest.param("full", marks=pytest.mark.slow), "lora"])
@pytest.mark.slow
def test_a_classifier_learns_and_opens_elsewhere(readers: Home, tuner: str) -> None:
    rate = {"full": 3e-3, "lora": 1e-2}[tuner]
    made, end = run(readers, tiny.label_rows(60), model="bert", head="classify", tuner=tuner, learning_rate=rate)
    metrics = end["metrics"]
    assert metrics["full_valid_accuracy"] == metrics["full_valid_mean_token_accuracy"] > 0.8
    assert 0.8 < metrics["full_valid_macro_f1"] <= 1
    record = read_artefact(made.result)
    assert (record.head, tuple(record.labels or ())) == ("classify", COLOURS)

    if tuner == "full":
        model = AutoModelForSequenceClassification.from_pretrained(made.result)
        assert model.config.id2label == dict(enumerate(COLOURS))
    else:
        base = AutoModelForSequenceClassification.from_pretrained(readers.models / "bert", num_labels=3)
        model = PeftModel.from_pretrained(base, made.result)
        assert json.loads((made.result / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    tokenizer, right, loss = AutoTokenizer.from_pretrained(made.result), 0, 0.0
    for row in tiny.label_rows(9):
        texts = [row["text"], *([row["text_pair"]] if "text_pair" in row else [])]
        given = tokenizer(*texts, return_tensors="pt", return_token_type_ids=True)
        types = {"token_type_ids": given["token_type_ids"]} if "text_pair" in row else {}
        with torch.no_grad():
            logits = model.eval()(input_ids=given["input_ids"], **types).logits[0]
        right += COLOURS[int(logits.argmax())] == row["label"]
        loss -= float(logits.log_softmax(-1)[COLOURS.index(row["label"])])
    assert right / 9 == pytest.approx(metrics["full_valid_accuracy"])
    assert loss / 9 == pytest.approx(metrics["full_valid_loss"], abs=1e-4)


@pytest.mark.slow
def test_a_classifier_is_continued_with_its_classes_and_writes_no_text(readers: Home) -> None:
    made, _ = run(readers, tiny.label_rows(18), model="bert", head="classify", tuner="full", n_epochs=1)
    name = read_artefact(made.result).name
    two = [row for row in tiny.label_rows(30) if row["label"] != "red"]
    again, _ = run(readers, two, model=name, head="classify", tuner="full", n_epochs=1)
    assert tuple(read_artefact(again.result).labels or ()) == COLOURS
    served = Artefacts(readers, torch.float32, Limits())
    with pytest.raises(UserError, match="no recipe can stand on it"):
        served.resolve(None, str(made.result))


@pytest.mark.slow
def test_values(readers: Home) -> None:
    rows = [{**row, "label": COLOURS.index(row["label"])} for row in tiny.label_rows(36)]
    made, end = run(readers, rows, model="bert", head="regress", tuner="full", learning_rate=3e-3)
    assert end["metrics"]["full_valid_mean_absolute_error"] < 0.6
    assert AutoModelForSequenceClassification.from_pretrained(made.result).config.num_labels == 1


@pytest.mark.slow
def test_an_encoder_decoder_job(readers: Home) -> None:
    rows = [
        {"prompt": r["messages"][1]["content"], "completion": r["messages"][2]["content"]} for r in tiny.sft_rows(24)
    ]
    made, end = run(readers, rows, model="t5", tuner="full", n_epochs=4, learning_rate=3e-3)
    assert any(e.data.get("layout") == "padded" for e in made.events())
    losses = [e.data["train_loss"] for e in made.events() if e.type == "metrics"]
    assert losses[-1] < 0.8 * losses[0]
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(made.result), AutoTokenizer.from_pretrained(made.result)
    total, n = 0.0, 0
    for row in rows[:9]:
        labels = tokenizer(row["completion"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model.eval()(input_ids=tokenizer(row["prompt"], return_tensors="pt")["input_ids"], labels=labels)
        total, n = total + float(out.loss) * labels.shape[1], n + labels.shape[1]
    assert total / n == pytest.approx(end["metrics"]["full_valid_loss"], rel=1e-4)
    with pytest.raises(UserError, match="not served"):
        served = Artefacts(readers, torch.float32, Limits())
        served.acquire(served.resolve(None, str(made.result)))


def test_one_class_or_chat_rows_are_refused(readers: Home) -> None:
    with pytest.raises(DataError, match=r"Every row .* label 'x'"):
        run(readers, [{"text": f"t {i}", "label": "x"} for i in range(12)], model="bert", head="classify")
    with pytest.raises(DataError, match="fine-tune-chat"):
        run(readers, tiny.sft_rows(12), model="bert", head="classify")


def test_head_and_objective_go_together() -> None:
    def spec(**fields: Any) -> Any:
        return checked({"model": "m", "training_file": "f", **fields})

    assert spec(head="classify").objective.name == "classify"
    assert spec(objective="regress").head == "regress"
    assert (spec(task="classify").head, spec(task="classify").objective.name) == ("lm", "sft")
    with pytest.raises(SpecError, match="trains the head 'lm'; use objective: classify"):
        spec(head="classify", objective="sft")
    with pytest.raises(SpecError, match="Did you mean 'classify'"):
        spec(head="clasify")
