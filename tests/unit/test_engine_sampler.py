"""Sampling against transformers' own warpers and against the exact distribution."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tunewright.core.errors import UserError
from tunewright.engine.request import Sampling, parse_request, settle
from tunewright.engine.sampler import choose, draw, edit_logits, logprobs


def reference(logits_V: torch.Tensor, how: Sampling) -> torch.Tensor:
    """[V] probabilities as transformers computes them."""
    scores = TemperatureLogitsWarper(how.temperature)(None, logits_V[None])  # type: ignore[arg-type]
    if how.top_k:
        scores = TopKLogitsWarper(how.top_k)(None, scores)  # type: ignore[arg-type]
    if how.top_p < 1:
        scores = TopPLogitsWarper(how.top_p)(None, scores)  # type: ignore[arg-type]
    return torch.softmax(scores[0], -1)


@pytest.mark.parametrize("vocab", [7, 700, 3000])
@pytest.mark.parametrize(
    "how",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=2.0, top_k=5),
        Sampling(temperature=0.8, top_p=0.6),
        Sampling(temperature=1.0, top_p=0.999),
        Sampling(temperature=1.3, top_p=0.9, top_k=20),
        Sampling(temperature=1.0, top_p=0.5, top_k=600),
    ],
)
def test_the_distribution_is_transformers(vocab: int, how: Sampling) -> None:
    """An even grid of draws hits each token in proportion to its probability, to within one point of the grid."""
    torch.manual_seed(vocab)
    logits_V = torch.randn(vocab) * 3
    wanted = reference(logits_V, how)
    n = 2000
    counts = Counter(choose(logits_V, how, (i + 0.5) / n) for i in range(n))
    for token in range(vocab):
        assert abs(counts[token] - n * float(wanted[token])) <= 1.01, token


def test_flat_logits_with_top_p_need_the_whole_vocabulary() -> None:
    kept = {choose(torch.zeros(20_000), Sampling(top_p=0.9), (i + 0.5) / 50) for i in range(50)}
    assert len(kept) == 50


@pytest.mark.parametrize("how", [Sampling(temperature=0), Sampling(top_k=1), Sampling(top_p=0)])
def test_greedy(how: Sampling) -> None:
    logits_V = torch.tensor([0.1, 5.0, 4.9, -3.0])
    assert {choose(logits_V, how, u) for u in (0.0, 0.5, 0.999999)} == {1}


def test_extreme_draws_and_temperatures() -> None:
    logits_V = torch.tensor([1000.0, -1000.0, 999.0])
    assert choose(logits_V, Sampling(temperature=1e-6), 0.99) == 0
    assert choose(logits_V, Sampling(), 0.0) == 0
    assert choose(logits_V, Sampling(), math.nextafter(1.0, 0.0)) == 2


def test_draws_depend_on_their_arguments_only() -> None:
    draws = [draw(seed, choice, position) for seed in (1, 2) for choice in range(5) for position in range(200)]
    assert draws == [draw(seed, choice, position) for seed in (1, 2) for choice in range(5) for position in range(200)]
    assert len(set(draws)) == len(draws)
    assert all(0 <= u < 1 for u in draws)
    assert abs(sum(draws) / len(draws) - 0.5) < 0.03


def test_penalties_and_bias() -> None:
    logits_V = torch.zeros(6)
    how = Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={4: 100.0, 99: 1.0})
    edited = edit_logits(logits_V, how, Counter({1: 1, 2: 4}))
    assert edited.tolist() == [0.0, -0.75, -1.5, 0.0, 100.0, 0.0]
    assert logits_V.tolist() == [0.0] * 6
    assert edit_logits(logits_V, Sampling(), Counter({1: 1})) is logits_V


def test_logprobs() -> None:
    torch.manual_seed(0)
    logits_V = torch.randn(50)
    wanted = torch.log_softmax(logits_V, -1)
    own, top = logprobs(logits_V, 7, 3)
    assert own == pytest.approx(float(wanted[7]))
    assert [t for t, _ in top] == wanted.argsort(descending=True)[:3].tolist()
    assert [p for _, p in top] == pytest.approx(wanted.sort(descending=True).values[:3].tolist())


def test_a_request_wins_over_the_artefact_and_both_over_the_defaults() -> None:
    asked = parse_request({"base": "m", "prompt": "x", "temperature": 0.3, "seed": 5, "stop": "END"})
    how = settle(asked, {"temperature": 0.0, "max_tokens": 32, "something_else": 1})
    assert (how.sampling.temperature, how.sampling.top_p, how.sampling.seed) == (0.3, 1.0, 5)
    assert (how.max_tokens, how.stop) == (32, ("END",))
    assert settle(parse_request({"base": "m", "prompt": "x"}), {}).sampling.temperature == 1.0


def test_without_a_seed_every_request_has_its_own() -> None:
    asked = parse_request({"base": "m", "prompt": "x"})
    assert len({settle(asked, {}).sampling.seed for _ in range(5)}) == 5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"temprature": 1}, "Did you mean 'temperature'?"),
        ({"temperature": 3}, "temperature: Input should be less than or equal to 2 (got 3)"),
        ({"prompt": None}, "either 'messages' or 'prompt'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "either 'messages' or 'prompt'"),
        ({"base": None}, "give 'base'"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [""]}, "empty text"),
        ({"logprobs": 21}, "0 to 20"),
        ({"n": 0}, "n: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"logit_bias": {"5": 101}}, "-100 to 100"),
        ({"prompt_embeds": "x"}, "unknown field 'prompt_embeds'"),
    ],
)
def test_a_bad_request_is_one_clear_error(change: dict, says: str) -> None:
    with pytest.raises(UserError) as e:
        parse_request({"base": "m", "prompt": "x", **change})
    assert says in e.value.message and "\n" not in e.value.message


@pytest.mark.parametrize(("value", "top"), [(None, None), (False, None), (True, 0), (0, 0), (5, 5)])
def test_logprobs_option(value: bool | int | None, top: int | None) -> None:
    assert parse_request({"base": "m", "prompt": "x", "logprobs": value}).top_logprobs == top
