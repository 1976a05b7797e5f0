"""Whole jobs on texts, labels and pairs: metrics, files that open elsewhere, exact resume, bad rows refused."""

from __future__ import annotations

import json
import math
import shutil
from typing import Any

import pytest
import torch
from job_kit import attempt, checked, stop_after, weights
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import tiny
from tunewright.core.durable import read_json
from tunewright.core.errors import DataError, Interrupted, SpecError
from tunewright.core.home import Home
from tunewright.core.run import Run, read_artefact
from tunewright.core.spec import extra_files
from tunewright.data.rendered import StoredGroups
from tunewright.jobs.prepare import create_run

Rows = list[dict[str, Any]]


def pair_rows(n: int) -> Rows:
    """Pairs whose better answer names a colour; some are better by a margin."""
    rows = []
    for i in range(n):
        question = f"Question {i}: what colour is {tiny.THINGS[i % len(tiny.THINGS)]}?"
        good, bad = f"It is {tiny.COLOURS[i % 6]}.", "I will not say that." if i % 2 else "Who knows?"
        pair = {"preferred_output": good, "non_preferred_output": bad}
        rows.append(
            {"input": {"messages": [{"role": "user", "content": question}]}}
            | {k: [{"role": "assistant", "content": v}] for k, v in pair.items()}
            | ({"margin": 0.5} if i % 4 == 0 else {})
        )
    return rows


def several_rows(n: int) -> Rows:
    """Texts that name some of three colours, labelled with them."""
    names = tiny.COLOURS[:3]
    sets = [[c for k, c in enumerate(names) if i >> k & 1] for i in range(8)]
    return [{"text": f"Number {i} is {' and '.join(sets[i % 8]) or 'clear'}", "label": sets[i % 8]} for i in range(n)]


def text_rows(n: int) -> Rows:
    """n texts of one to five sentences."""
    said = [[f"{tiny.THINGS[(i + k) % 8]} is {tiny.COLOURS[k % 6]}." for k in range(1 + i % 5)] for i in range(n)]
    return [{"text": " ".join(sentences)} for sentences in said]


def new_run(home: Home, rows: Rows, valid: Rows | None = None, more: dict[str, Rows] | None = None, **spec: Any) -> Run:
    """A small job; more: files by the name that the spec gives them."""
    files = {"train": rows, **({"valid": valid} if valid else {}), **(more or {})}
    paths = {name: tiny.write_rows(home.root / f"{name}.jsonl", content) for name, content in files.items()}
    fields = {
        "model": "tiny", "training_file": "train", "validation_file": "valid" if valid else None, "dtype": "float32",
        "threads": 1, "seed": 1, "n_epochs": 2, "batch_size": 4, "path": "plain", "tuner": {"name": "lora", "r": 4},
    }  # fmt: skip
    made = checked({**fields, **spec})
    others = {role: paths[file] for role, file in extra_files(made).items()}
    return create_run(home, made, train_path=paths["train"], validation_path=paths.get("valid"), more=others)


def last(run: Run) -> dict[str, Any]:
    return [e.data for e in run.events() if e.type == "metrics"][-1]


def resumed(run: Run, home: Home, at: int) -> Run:
    """A copy of a job that has not begun, stopped and continued."""
    attempt_stopped = Run(run.folder.with_name(f"{run.id}-again"))
    shutil.copytree(run.folder, attempt_stopped.folder)
    with pytest.raises(Interrupted):
        attempt(attempt_stopped, home, 1, stop_after(at))
    attempt(attempt_stopped, home, 2)
    return attempt_stopped


def test_a_reward_model(tiny_home: Home) -> None:
    """Trained with LoRA on a decoder; its files say the same in transformers and peft; resumed, the same bits."""
    run = new_run(tiny_home, pair_rows(16), pair_rows(20)[16:], head="reward", learning_rate=1e-2)
    again = resumed(run, tiny_home, 3)
    attempt(run, tiny_home)
    assert weights(run) == weights(again)
    said = last(run)
    assert said["full_valid_pair_accuracy"] == said["full_valid_mean_token_accuracy"] > 0.7
    assert {"train_pair_accuracy", "train_reward_margin", "full_valid_reward_margin"} <= said.keys()
    record = read_artefact(run.result)
    assert (record.head, record.labels) == ("reward", ["reward"])

    base = AutoModelForSequenceClassification.from_pretrained(tiny_home.models / "tiny", num_labels=1)
    model = PeftModel.from_pretrained(base, run.result).eval()
    assert json.loads((run.result / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    groups = StoredGroups(run.folder / "rendered" / "validation")
    gaps = []
    for group in groups:
        with torch.no_grad():
            better, worse = (float(model(torch.tensor([e.ids])).logits) for e in group.examples)
        gaps.append(better - worse - (group.examples[0].margin or 0.0))
    want = sum(math.log1p(math.exp(-g)) for g in gaps) / len(gaps)
    assert said["full_valid_loss"] == pytest.approx(want, abs=1e-4)
    assert [g.examples[0].margin for g in groups] == [0.5, None, None, None]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "tuner"),
    [("bert", "full"), *(pytest.param(*c, marks=pytest.mark.nightly) for c in [("bert", "lora"), ("tiny", "full")])],
)
def test_reward_models_of_every_kind_open_elsewhere(tiny_home: Home, model: str, tuner: str) -> None:
    tiny.build_reader(tiny_home.models / "bert", "bert")
    rate = 1e-2 if tuner == "lora" else 2e-3
    run = new_run(
        tiny_home,
        pair_rows(24),
        pair_rows(30)[24:],
        model=model,
        head="reward",
        tuner=tuner,
        learning_rate=rate,
        n_epochs=4,
    )
    attempt(run, tiny_home)
    said = last(run)
    assert said["full_valid_pair_accuracy"] > 0.7
    opener = AutoModelForSequenceClassification.from_pretrained
    if tuner == "full":
        net = opener(run.result)
    else:
        net = PeftModel.from_pretrained(opener(tiny_home.models / model, num_labels=1), run.result)
    hits = []
    for row in pair_rows(30)[24:]:
        asked = row["input"]["messages"][0]["content"]
        answers = [row[k][0]["content"] for k in ("preferred_output", "non_preferred_output")]
        tokenizer = AutoTokenizer.from_pretrained(run.result)
        scores = []
        for answer in answers:
            if model == "bert":
                given = tokenizer(asked, answer, return_tensors="pt", return_token_type_ids=True)
                given = {"input_ids": given["input_ids"], "token_type_ids": given["token_type_ids"]}
            else:
                turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
                given = {"input_ids": torch.tensor([tokenizer.apply_chat_template(turns, return_dict=False)])}
            with torch.no_grad():
                scores.append(float(net.eval()(**given).logits))
        hits.append(scores[0] > scores[1])
    assert sum(hits) / len(hits) == pytest.approx(said["full_valid_pair_accuracy"])


@pytest.mark.slow
def test_several_classes(tiny_home: Home) -> None:
    tiny.build_reader(tiny_home.models / "bert", "bert")
    balanced = {"name": "multilabel", "class_weights": "balanced"}
    options = {"model": "bert", "head": "multilabel", "tuner": "full", "learning_rate": 3e-3, "n_epochs": 8}
    run = new_run(tiny_home, several_rows(64), several_rows(16), **options, objective=balanced)
    attempt(run, tiny_home)
    said = last(run)
    assert said["full_valid_accuracy"] > 0.7 and said["full_valid_macro_f1"] > 0.8
    assert read_json(run.folder / "labels.json") == {"labels": ["blue", "green", "red"], "counts": [32] * 3, "rows": 64}
    net = AutoModelForSequenceClassification.from_pretrained(run.result).eval()
    assert net.config.problem_type == "multi_label_classification"
    tokenizer, right = AutoTokenizer.from_pretrained(run.result), 0
    for row in several_rows(16):
        with torch.no_grad():
            logits = net(input_ids=tokenizer(row["text"], return_tensors="pt")["input_ids"]).logits[0]
        right += {net.config.id2label[k] for k, z in enumerate(logits.tolist()) if z > 0} == set(row["label"])
    assert right / 16 == pytest.approx(said["full_valid_accuracy"])


def test_a_label_outside_the_set_names_the_set_the_nearest_and_the_line(tiny_home: Home) -> None:
    rows = [*several_rows(12), {"text": "x", "label": ["gren"]}]
    named = {"name": "multilabel", "labels": ["red", "green", "blue"]}
    run = new_run(tiny_home, rows, head="multilabel", objective=named)
    with pytest.raises(
        DataError, match=r"line 13: has the label 'gren'.*Did you mean 'green'\? Classes: red, green, b"
    ):
        attempt(run, tiny_home)
    run = new_run(tiny_home, rows[:12], head="classify")
    with pytest.raises(DataError, match=r"has a list of \d labels.*use head: multilabel"):
        attempt(run, tiny_home)
    weights = {"name": "multilabel", "class_weights": {"rot": 2.0}}
    run = new_run(tiny_home, rows[:12], head="multilabel", objective=weights)
    with pytest.raises(SpecError, match=r"no class 'rot' \(classes: blue, green, red\)"):
        attempt(run, tiny_home)


@pytest.mark.parametrize("documents", ["separate", pytest.param("joined", marks=pytest.mark.slow)])
def test_domain_then_task_in_one_job(tiny_home: Home, documents: str) -> None:
    """Texts in blocks, then chat rows; perplexity follows; resumed in the middle, the same bits."""
    run = new_run(
        tiny_home, text_rows(40), text_rows(8), {"task": tiny.sft_rows(12)}, max_length=80, learning_rate=5e-3,
        objective={"name": "pretrain", "documents": documents}, mix={"files": ["task"], "order": "in_turn"},
    )  # fmt: skip
    again = resumed(run, tiny_home, 4)
    attempt(run, tiny_home)
    assert weights(run) == weights(again)
    steps = [e.data for e in run.events() if e.type == "metrics"]
    for d in steps:
        assert d["train_perplexity"] == pytest.approx(math.exp(d["train_loss"]))
    assert steps[-1]["full_valid_perplexity"] < math.exp(run.plan()["base"]["loss"])
    blocks = StoredGroups(run.folder / "rendered" / "train")
    assert len(blocks) < 40 and all(g.n_tokens <= 80 for g in blocks)
    assert run.plan()["mix"] == [[len(blocks), len(blocks)], [12, 12]] and run.plan()["in_turn"]


@pytest.mark.slow
def test_texts_beside_the_task_and_not_instead(tiny_home: Home) -> None:
    """SFT takes texts of `mix` as blocks; a training file of texts is for another objective."""
    run = new_run(tiny_home, tiny.sft_rows(12), more={"texts": text_rows(9)}, mix=["texts"], n_epochs=1)
    attempt(run, tiny_home)
    assert len(StoredGroups(run.folder / "rendered" / "mix-1")) == 1  # of 1024 tokens, or the context
    with pytest.raises(DataError, match="text"):
        attempt(new_run(tiny_home, text_rows(12)), tiny_home)
    with pytest.raises(DataError, match="chat"):
        attempt(new_run(tiny_home, tiny.sft_rows(12), objective="pretrain"), tiny_home)


@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_a_reward_model_goes_on_from_a_tuned_one(tiny_home: Home, tuner: str) -> None:
    """The body is that of the supervised model, with which training hardly moves; the head is new."""
    first = new_run(tiny_home, tiny.sft_rows(12), n_epochs=1, learning_rate=1e-2)
    attempt(first, tiny_home)
    options = {"tuner": {"name": "lora", "r": 4} if tuner == "lora" else "full", "learning_rate": 1e-10}
    run = new_run(tiny_home, pair_rows(12), model=first.job().name, head="reward", n_epochs=1, **options)
    attempt(run, tiny_home)
    before = load_file(first.result / "adapter_model.safetensors")
    if tuner == "lora":
        after = load_file(run.result / "adapter_model.safetensors")
        new = set(after) - set(before)
        assert len(new) == 1 and next(iter(new)).endswith("score.weight")
    else:
        base = AutoModelForCausalLM.from_pretrained(tiny_home.models / "tiny")
        merged = PeftModel.from_pretrained(base, first.result).merge_and_unload()
        before, after = dict(merged.named_parameters()), load_file(run.result / "model.safetensors")
        before = {name: p.detach() for name, p in before.items() if name != "lm_head.weight"}
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-5, rtol=1e-5)
