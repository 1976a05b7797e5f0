"""Served heads say what transformers says: encoder and decoder, full and LoRA, alone or together, asked in a chat."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import engine_kit as kit
import tiny
from tunewright.core.errors import UserError
from tunewright.core.home import Home
from tunewright.engine.engine import Engine
from tunewright.engine.request import RowsRequest, parse_as, parse_request

LABELS = ["red", "green", "blue"]
TEXTS = ["the sky is blue", "It is red.", "a leaf", "Question 7: what colour is the sea? Think well."]
PAIRS = [{"text": "the sky", "text_pair": "Are you sure?"}, {"text": "a raven", "text_pair": "black"}]
SAID = [
    {"role": "user", "content": "Question 1: what colour is a leaf?"},
    {"role": "assistant", "content": "It is green."},
]
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Home:
    root = tmp_path_factory.mktemp("rows")
    home = kit.make_home(root / "home", tiny_model_dir)
    tiny.build_reader(home.models / "bert", "bert")
    return home


@pytest.fixture(scope="module")
def make(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """make(base, tuner, head, labels) -> a folder as a job leaves it, with random weights."""

    def artefact(base: str, tuner: str, head: str, labels: list[str]) -> Path:
        folder = tmp_path_factory.mktemp(f"{base}-{tuner}-{head}")
        torch.manual_seed(7)
        problem = "multi_label_classification" if head == "multilabel" else None
        net: Any = AutoModelForSequenceClassification.from_pretrained(
            home.models / base, num_labels=len(labels), problem_type=problem
        )
        for p in net.parameters():
            p.data += 0.1 * torch.randn_like(p)
        if tuner == "lora":
            net.save_pretrained(folder / "base")
            whole = ["classifier", "pooler"] if base == "bert" else ["score"]
            targets = ["query", "value"] if base == "bert" else ["q_proj", "down_proj"]
            options = LoraConfig(r=4, task_type="SEQ_CLS", modules_to_save=whole, target_modules=targets)
            net = get_peft_model(net, options)
            for name, p in net.named_parameters():
                p.data += 0.2 * torch.randn_like(p) if "lora_" in name or "modules_to_save" in name else 0
            AutoTokenizer.from_pretrained(home.models / base).save_pretrained(folder / "base")
        net.save_pretrained(folder)
        AutoTokenizer.from_pretrained(home.models / base).save_pretrained(folder)
        over = str(folder / "base") if tuner == "lora" else None
        kind = "adapter" if tuner == "lora" else "weights"
        return kit.write_artefact(folder, kind, over, head=head, labels=labels)

    return artefact


def theirs(folder: Path, **given: Any) -> torch.Tensor:
    """The logits of transformers and peft for one row."""
    from peft import PeftModel

    opener = AutoModelForSequenceClassification.from_pretrained
    if (folder / "adapter_config.json").exists():
        labels = parse_labels(folder)
        net: Any = PeftModel.from_pretrained(opener(folder / "base", num_labels=labels), folder)
    else:
        net = opener(folder)
    with torch.no_grad():
        return net.eval()(**given).logits[0]


def parse_labels(folder: Path) -> int:
    from tunewright.core.run import read_artefact

    return len(read_artefact(folder).labels or ())


def judged(engine: Engine, folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return engine.rows.judge(parse_as(RowsRequest, {"artefact": str(folder), "rows": rows}))


def tokens(folder: Path, *texts: str) -> dict[str, torch.Tensor]:
    found = AutoTokenizer.from_pretrained(folder)(*texts, return_tensors="pt", return_token_type_ids=len(texts) > 1)
    return {k: v for k, v in found.items() if k != "attention_mask"}


@pytest.fixture(scope="module")
def engine(home: Home) -> Engine:
    return Engine(home, dtype="float32", threads=1)


CASES = [
    ("bert", "full", "classify"),
    ("tiny", "lora", "multilabel"),
    pytest.param("bert", "lora", "classify", marks=pytest.mark.slow),
    pytest.param("tiny", "full", "classify", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("base", "tuner", "head"), CASES)
def test_distributions_are_those_of_transformers(engine: Engine, make: Make, base: str, tuner: str, head: str) -> None:
    folder = make(base, tuner, head, LABELS)
    rows: list[dict[str, Any]] = [{"text": t} for t in TEXTS] + (PAIRS if base == "bert" else [])
    together = judged(engine, folder, rows)
    assert together["labels"] == LABELS and together["head"] == head
    for row, said in zip(rows, together["results"], strict=True):
        logits = theirs(folder, **tokens(folder, *row.values()))
        want = logits.softmax(-1) if head == "classify" else logits.sigmoid()
        assert list(said["distribution"].values()) == pytest.approx(want.tolist(), abs=1e-5)
        (alone,) = judged(engine, folder, [row])["results"]
        assert alone["distribution"] == pytest.approx(said["distribution"], abs=1e-6)
        if head == "classify":
            assert said["label"] == LABELS[int(want.argmax())]
        else:
            assert said["labels"] == [name for name, p in zip(LABELS, want.tolist(), strict=True) if p > 0.5]
    assert together["prompt_tokens"] > 0


@pytest.mark.parametrize(
    ("base", "tuner"),
    [("tiny", "lora"), ("bert", "full"), *(pytest.param(*c, marks=pytest.mark.slow) for c in [("tiny", "full")])],
)
def test_a_reward_model_scores_conversations(engine: Engine, make: Make, base: str, tuner: str) -> None:
    folder = make(base, tuner, "reward", ["reward"])
    (said,) = judged(engine, folder, [{"messages": SAID}])["results"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if base == "bert":
        given = tokens(folder, SAID[0]["content"], SAID[1]["content"])
    else:
        given = {"input_ids": torch.tensor([tokenizer.apply_chat_template(SAID, return_dict=False)])}
    want = float(theirs(folder, **given))
    assert said == {"score": pytest.approx(want, abs=1e-4)}
    done = engine.generate(parse_request({"artefact": str(folder), "messages": SAID}))
    assert float(done["choices"][0]["text"]) == pytest.approx(want, abs=1e-3)
    with pytest.raises(UserError, match="must end with an assistant message"):
        judged(engine, folder, [{"messages": SAID[:1]}])
    with pytest.raises(UserError, match="reads 'messages'; use /v1/tunewright/score"):
        judged(engine, folder, [{"text": "x"}])


def test_a_classifier_answers_a_chat_with_its_label(engine: Engine, make: Make) -> None:
    folder = make("tiny", "full", "classify", LABELS)
    (want,) = judged(engine, folder, [{"text": TEXTS[0]}])["results"]
    log: list[dict[str, Any]] = []
    ask = {"artefact": str(folder), "messages": [{"role": "user", "content": TEXTS[0]}], "n": 2, "logprobs": 2}
    engine.add_request(parse_request(ask), log.append)
    assert [e["type"] for e in log] == ["start", "token", "token", "done"]
    assert {e["text"] for e in log[1:3]} == {want["label"]} == {c["text"] for c in log[-1]["choices"]}
    best = sorted(want["distribution"].items(), key=lambda kv: -kv[1])
    assert math.exp(log[1]["logprob"]) == pytest.approx(best[0][1])
    assert [(t["token"], pytest.approx(math.exp(t["logprob"]))) for t in log[1]["top_logprobs"]] == best[:2]
    n = log[0]["prompt_tokens"]
    assert log[-1]["usage"] == {"prompt_tokens": n, "completion_tokens": 2, "total_tokens": n + 2}
    system = [{"role": "system", "content": "Be brief."}, *ask["messages"]]
    with pytest.raises(UserError, match=r"one user message.*roles system, user"):
        engine.add_request(parse_request({**ask, "messages": system}), log.append)
    with pytest.raises(UserError, match="send 'messages'"):
        engine.add_request(parse_request({"artefact": str(folder), "prompt": "x"}), log.append)
    with pytest.raises(UserError, match="tokens; this model reads 1 to 512"):
        judged(engine, folder, [{"text": "red" + " red" * 599}])


def test_heads_are_forgotten_like_other_weights(home: Home, make: Make) -> None:
    engine = Engine(home, dtype="float32", threads=1)
    folders = [make("tiny", "full", "regress", ["value"]) for _ in range(engine.limits.max_models + 1)]
    values = [judged(engine, f, [{"text": "a"}])["results"][0]["value"] for f in folders]
    assert values == pytest.approx([values[0]] * len(values))  # the same seed
    assert engine.stats()["models"] == [str(f.resolve()) for f in folders[1:]]
    assert engine.unload(str(folders[1])) == 1 and engine.unload() == len(folders) - 2
    assert engine.stats()["models"] == []


def test_a_model_that_writes_text_is_no_judge(engine: Engine, home: Home) -> None:
    with pytest.raises(UserError, match="'tiny' writes text; it has no head"):
        engine.rows.judge(parse_as(RowsRequest, {"base": kit.BASE, "rows": [{"text": "x"}]}))
    with pytest.raises(UserError, match="give 'base'"):
        parse_as(RowsRequest, {"rows": [{"text": "x"}]})
    with pytest.raises(UserError, match="either 'text' or 'messages'"):
        parse_as(RowsRequest, {"base": kit.BASE, "rows": [{}]})
