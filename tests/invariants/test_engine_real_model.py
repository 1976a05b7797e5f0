"""SmolLM2-135M-Instruct: the engine's greedy answers are transformers' generate, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import engine_kit as kit
import tiny
from tunewright.core.home import Home
from tunewright.engine.engine import Engine, Event

NAME = tiny.SMOLLM2
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "List three uses of vinegar, in German: Größe, Länge, 你好.",
    "Explain why the sky is blue. " + "Be precise and give an example. " * 20,
)

pytestmark = [pytest.mark.slow, pytest.mark.real_model]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Home:
    made = Home(tmp_path_factory.mktemp("real") / "home").ensure()
    (made.models / NAME).symlink_to(smollm2, target_is_directory=True)
    return made


@pytest.fixture(scope="module")
def logs(home: Home) -> list[list[Event]]:
    """The engine's answers in float32, all computed together."""
    engine = Engine(home, dtype="float32", threads=1)
    return kit.run_all(engine, [request(q) for q in QUESTIONS], spread=3)


def request(question: str) -> dict[str, Any]:
    return {
        "base": NAME,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0.0,
        "max_tokens": 24,
        "logprobs": 5,
    }


def test_greedy_is_generate(smollm2: Path, logs: list[list[Event]]) -> None:
    from transformers import AutoTokenizer

    tokenizer, net = AutoTokenizer.from_pretrained(smollm2), kit.hf_model(smollm2)
    for question, log in zip(QUESTIONS, logs, strict=True):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        assert kit.tokens(log) == kit.reference(net, prompt, 24)
        assert len(kit.tokens(log)) > 5


def test_bfloat16_stays_near(home: Home, logs: list[list[Event]]) -> None:
    """A near tie may fall the other way, so what is compared is what the model thinks of the likeliest first tokens."""
    engine = Engine(home, dtype="bfloat16", threads=1)
    fast = kit.run_all(engine, [{**request(q), "max_tokens": 1} for q in QUESTIONS])
    for exact, found in zip(logs, fast, strict=True):
        wanted, got = likeliest(exact), likeliest(found)
        shared = wanted.keys() & got.keys()
        assert len(shared) >= 4
        assert all(abs(wanted[t] - got[t]) < 0.2 for t in shared)


def likeliest(log: list[Event]) -> dict[str, float]:
    """Token -> log-probability, of the first position."""
    return {t["token"]: t["logprob"] for t in log[1]["top_logprobs"]}
