"""A model that is trained on its fast path answers through it, as its plain modules do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain import fast, give_biases, lora
from torch import nn

import tiny
from tunewright.core.example import Example, Group
from tunewright.core.home import Home
from tunewright.data.tokenizer import Tokenizer
from tunewright.engine.held import NAME, engine_over, serving
from tunewright.engine.request import GenerateRequest
from tunewright.engine.scheduler import Limits
from tunewright.models.policy import Policy
from tunewright.ops.kernels import Kernels
from tunewright.ops.packing import collate

PROMPTS = [[5, 17, 60, 41, 9, 80, 33, 12, 71], [3, 4, 5, 6, 7], [90, 8]]


def answers(policy: Policy, folder: Path, home: Home, path: Any, new: int = 9) -> list[list[int]]:
    """Three draws for each prompt, begun in pieces of at most 7 tokens."""
    limits = Limits(chunk_tokens=7)
    engine, running = engine_over(policy.model, Tokenizer.load(folder), 60, home, limits, path), []
    with policy.computing(), serving(policy.model):
        for i, prompt in enumerate(PROMPTS):
            how = {"base": NAME, "prompt": prompt, "n": 3, "max_tokens": new, "seed": i, "temperature": 1.0}
            running.append(engine.requests[engine.add_request(GenerateRequest.model_validate(how), lambda e: None)])
        while engine.step():
            pass
    return [s.tokens for r in running for s in r.sequences]


def move(model: nn.Module) -> None:
    """What an optimizer does."""
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=g))


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_the_fast_path_answers_as_the_plain_modules(
    tmp_path: Path, tiny_model_dir: Path, kernels: Kernels, family: str
) -> None:
    """Biases in Qwen2, a window of 3 tokens in Mistral; after a gradient and an update, too."""
    folder, home = tiny.build_family(tmp_path / "model", family, tiny_model_dir), Home(tmp_path / "home").ensure()
    _, model = lora(folder)
    give_biases(model)
    policy = fast(model, kernels)
    first = answers(policy, folder, home, policy.fast)
    assert first == answers(policy, folder, home, None) and len({tuple(x) for x in first}) > 6
    rows = [Group((Example(tuple(range(3, 20)), (1.0,) * 17),))]
    policy.token_stats(collate(rows), {"logp"})["logp"].sum().backward()
    move(model)
    moved = answers(policy, folder, home, policy.fast)
    assert moved == answers(policy, folder, home, None) != first


def test_on_tiles_an_answer_is_likely_to_the_pass_that_trains_on_it(tmp_path: Path, kernels: Kernels) -> None:
    """The states that the sampling computes token by token are those of the whole row, but for rounding."""
    if not kernels.tiles:
        pytest.skip("this processor has no AMX tiles")
    folder, home = tiny.build_tiny_model(tmp_path / "tiled", **tiny.TILED), Home(tmp_path / "home").ensure()
    _, model = lora(folder, torch.bfloat16)
    policy = fast(model, kernels, torch.bfloat16)
    seen: list[torch.Tensor] = []
    serve = policy.fast.serve  # type: ignore[union-attr]
    policy.fast.serve = lambda *given: seen.append(serve(*given)) or seen[-1]  # type: ignore[union-attr]
    engine = engine_over(model, Tokenizer.load(folder), 60, home, Limits(chunk_tokens=4), policy.fast)
    how = {"base": NAME, "prompt": PROMPTS[0], "max_tokens": 6, "temperature": 0.0}
    with policy.computing(), serving(model):
        request = engine.requests[engine.add_request(GenerateRequest.model_validate(how), lambda e: None)]
        while engine.step():
            pass
    (sequence,) = request.sequences
    row = Group((Example(tuple(sequence.tokens), (1.0,) * len(sequence.tokens)),))
    with torch.no_grad():
        whole = policy.hidden(collate([row])).float()
    n = len(sequence.tokens) - len(PROMPTS[0])
    found = torch.cat(seen[-n:]).float()
    want = whole[len(PROMPTS[0]) - 1 : -1]
    assert n == 6 and (found - want).norm() <= 0.02 * want.norm()
