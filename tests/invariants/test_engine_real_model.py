"""SmolLM2-135M-Instruct: the engine's greedy answers are transformers' generate, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import engine_kit as kit
from tunewright.core.home import Home
from tunewright.engine.engine import Engine
from tunewright.models.loader import materialise

NAME = "smollm2-135m-instruct"
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "List three uses of vinegar, in German: Größe, Länge, 你好.",
    "Explain why the sky is blue. " + "Be precise and give an example. " * 30,
)

pytestmark = [pytest.mark.slow, pytest.mark.real_model]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("real") / "home").ensure()


@pytest.fixture(scope="module")
def folder(home: Home) -> Path:
    return materialise(NAME, home)


@pytest.fixture(scope="module")
def answers(home: Home, folder: Path) -> list[list[int]]:
    """The engine's answers in float32, all computed together."""
    engine = Engine(home, dtype="float32", threads=2)
    return [kit.tokens(log) for log in kit.run_all(engine, [request(q) for q in QUESTIONS], spread=3)]


def request(question: str) -> dict[str, Any]:
    return {
        "base": NAME,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0.0,
        "max_tokens": 48,
    }


def test_greedy_is_generate(home: Home, folder: Path, answers: list[list[int]]) -> None:
    from transformers import AutoTokenizer

    tokenizer, net = AutoTokenizer.from_pretrained(folder), kit.hf_model(folder)
    for question, found in zip(QUESTIONS, answers, strict=True):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        assert found == kit.reference(net, prompt, 48)
        assert len(found) > 5


def test_bfloat16_begins_the_same(home: Home, folder: Path, answers: list[list[int]]) -> None:
    """bfloat16 may take another turn at a near tie; the first word of each answer stands."""
    engine = Engine(home, dtype="bfloat16", threads=2)
    logs = kit.run_all(engine, [request(q) for q in QUESTIONS])
    assert [kit.tokens(log)[0] for log in logs] == [a[0] for a in answers]
