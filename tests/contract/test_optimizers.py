"""The law of every optimizer in the table: it is its formula; saved, loaded and continued = uninterrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tunewright.train.optim import OPTIMIZERS
from tunewright.train.optim.state import load_optimizer_state, optimizer_state

SHAPES = {"layer.weight": (80, 64), "tall.weight": (96, 10), "layer.bias": (12,), "embed_tokens.weight": (50, 6)}
LR = 0.01


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return {n: nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for n, shape in SHAPES.items()}


# those that need a package which the environment does not have, see conftest.py
EVERY = [pytest.param(n, marks=pytest.mark.slow) if OPTIMIZERS.load(n).card.needs else n for n in OPTIMIZERS]


def gradient(name: str, step: int) -> Tensor:
    g = torch.Generator().manual_seed(1000 * step + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=g)


def run(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], steps: range) -> None:
    """One update a step, at a rate that changes."""
    for step in steps:
        for name, p in named.items():
            p.grad = gradient(name, step)
        for group in optimizer.param_groups:
            group["lr"] = LR / step
        optimizer.step()


def build(name: str, named: dict[str, nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    part = OPTIMIZERS.load(name)
    return part.build(named, LR, part.Options(**options))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("k", [1, 3])
def test_saved_loaded_and_continued_is_uninterrupted(name: str, k: int, tmp_path: Path) -> None:
    """Bit for bit, through a safetensors file as in a checkpoint; with 8-bit moments within a rounding of them."""
    whole = parameters()
    run(build(name, whole), whole, range(1, 6))

    first = parameters()
    optimizer = build(name, first)
    run(optimizer, first, range(1, k + 1))
    save_file(optimizer_state(optimizer, {id(p): n for n, p in first.items()}), tmp_path / "o.safetensors")
    second = {n: nn.Parameter(p.detach().clone()) for n, p in first.items()}
    fresh = build(name, second)
    load_optimizer_state(fresh, second, load_file(tmp_path / "o.safetensors"))
    run(fresh, second, range(k + 1, 6))
    for n in whole:
        if OPTIMIZERS.load(name).card.exact:
            assert torch.equal(second[n], whole[n]), n
        else:
            torch.testing.assert_close(second[n], whole[n], atol=0.1 * LR, rtol=0)


@pytest.mark.parametrize("name", EVERY)
def test_the_state_is_all_there(name: str) -> None:
    """Whatever the optimizer keeps between two steps is saved with its type."""
    named = parameters()
    optimizer = build(name, named)
    run(optimizer, named, range(1, 3))
    saved = optimizer_state(optimizer, {id(p): n for n, p in named.items()})
    fresh = build(name, named)
    load_optimizer_state(fresh, named, saved)
    for p in named.values():
        before = {k: v for k, v in optimizer.state[p].items() if v is not None}
        after = fresh.state[p]
        assert set(after) == set(before) != set()
        for key, value in before.items():
            assert type(after[key]) is type(value)
            assert torch.equal(torch.as_tensor(after[key]), torch.as_tensor(value)), key


@pytest.mark.parametrize("name", EVERY)
def test_weight_decay_is_for_matrices(name: str) -> None:
    """With gradients of zero, matrices shrink by lr * decay (to the order of the rate) and vectors stay."""
    named = parameters()
    before = {n: p.detach().clone() for n, p in named.items()}
    optimizer = build(name, named, weight_decay=0.5)
    for p in named.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for n, p in named.items():
        expected = before[n] if p.ndim == 1 else before[n] * (1 - LR * 0.5)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_card_and_options(name: str) -> None:
    part = OPTIMIZERS.load(name)
    schema = part.Options.model_json_schema()
    json.dumps(schema)
    assert len(schema["properties"]) <= 12
    assert all(p.get("description") for p in schema["properties"].values())
    assert part.card.title and part.__doc__
    with pytest.raises(ValidationError):
        part.Options(no_such_option=1)


@pytest.mark.parametrize("name", EVERY)
def test_it_descends(name: str) -> None:
    """A least-squares problem: the loss falls to less than a half."""
    g = torch.Generator().manual_seed(4)
    x, y = torch.randn(64, 16, generator=g), torch.randn(64, 300, generator=g)
    w = nn.Parameter(torch.zeros(16, 300))
    optimizer = build(name, {"w": w})
    rate = {"sgd": 1.0, "muon": 0.05}.get(name, 0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (x @ w - y).square().mean()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# Each formula in float64, straight from the paper: (parameter, gradient of each step) -> parameter


def adamw(w: Tensor, grads: list[Tensor], decay: float) -> Tensor:
    """arXiv 1711.05101, algorithm 2."""
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(grads, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        w = w - LR / t * (step + decay * w)
    return w


def lion(w: Tensor, grads: list[Tensor], decay: float) -> Tensor:
    """arXiv 2302.06675, algorithm 2."""
    m = torch.zeros_like(w)
    for t, g in enumerate(grads, 1):
        w = w - LR / t * (torch.sign(0.9 * m + 0.1 * g) + decay * w)
        m = 0.99 * m + 0.01 * g
    return w


def sgd(w: Tensor, grads: list[Tensor], decay: float, nesterov: bool = False) -> Tensor:
    buffer = torch.zeros_like(w)
    for t, g in enumerate(grads, 1):
        g = g + decay * w
        buffer = 0.9 * buffer + g if t > 1 else g
        w = w - LR / t * (g + 0.9 * buffer if nesterov else buffer)
    return w


def adafactor(w: Tensor, grads: list[Tensor], decay: float) -> Tensor:
    """arXiv 1804.04235, algorithm 4 for matrices and 5 for vectors, with a rate of the job's own."""
    row, col, square = torch.zeros(w.shape[:-1]), torch.zeros(w.shape[-1]), torch.zeros_like(w)
    for t, g in enumerate(grads, 1):
        beta = 1 - t**-0.8
        if w.ndim == 2:
            row = beta * row + (1 - beta) * (g**2 + 1e-30).sum(1)
            col = beta * col + (1 - beta) * (g**2 + 1e-30).sum(0)
            square = torch.outer(row, col) / row.sum()
        else:
            square = beta * square + (1 - beta) * (g**2 + 1e-30)
        update = g / square.sqrt()
        update = update / max(1.0, update.square().mean().sqrt().item())
        w = w - LR / t * (update + decay * w)
    return w


def muon(w: Tensor, grads: list[Tensor], decay: float) -> Tensor:
    """Exact polar factor in place of the iteration: Newton-Schulz brings singular values only near 1."""
    buffer = torch.zeros_like(w)
    for t, g in enumerate(grads, 1):
        buffer = 0.95 * buffer + 0.05 * g
        u, _, vt = torch.linalg.svd(0.05 * g + 0.95 * buffer, full_matrices=False)
        w = w - LR / t * (0.2 * max(w.shape) ** 0.5 * (u @ vt) + decay * w)
    return w


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("formula", [adamw, lion, sgd, adafactor])
def test_it_is_the_formula(formula: Any, decay: float) -> None:
    named = parameters()
    start = {n: p.detach().double() for n, p in named.items()}
    run(build(formula.__name__, named, weight_decay=decay), named, range(1, 6))
    for name, p in named.items():
        grads = [gradient(name, step).double() for step in range(1, 6)]
        expected = formula(start[name], grads, decay if p.ndim > 1 else 0.0)
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-4, atol=1e-6)


def test_nesterov_is_the_formula() -> None:
    named = parameters()
    start = {n: p.detach().double() for n, p in named.items()}
    run(build("sgd", named, nesterov=True), named, range(1, 6))
    for name, p in named.items():
        expected = sgd(start[name], [gradient(name, s).double() for s in range(1, 6)], 0.0, nesterov=True)
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-4, atol=1e-6)


def test_muon_goes_where_the_orthogonal_factor_points() -> None:
    named = parameters()
    start = {n: p.detach().double() for n, p in named.items()}
    run(build("muon", named, weight_decay=0.1), named, range(1, 4))
    for name in ("layer.weight", "tall.weight"):
        grads = [gradient(name, s).double() for s in range(1, 4)]
        moved, expected = named[name].detach() - start[name], muon(start[name], grads, 0.1) - start[name]
        assert torch.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.97
        assert 0.8 < moved.norm() / expected.norm() < 1.2


def test_muon_leaves_embeddings_and_vectors_to_adamw() -> None:
    named, plain = parameters(), parameters()
    run(build("muon", named), named, range(1, 4))
    run(build("adamw", plain, beta2=0.95), plain, range(1, 4))
    for name in named:
        assert torch.equal(named[name], plain[name]) == (name in ("layer.bias", "embed_tokens.weight"))


@pytest.mark.parametrize("scale_parameter", [False, True])
def test_adafactor_is_that_of_transformers(scale_parameter: bool) -> None:
    from transformers import Adafactor

    ours, theirs = parameters(), parameters()
    run(build("adafactor", ours, scale_parameter=scale_parameter), ours, range(1, 6))
    reference = Adafactor(theirs.values(), lr=LR, scale_parameter=scale_parameter, relative_step=False)
    run(reference, theirs, range(1, 6))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_eight_bits_stay_near_float32_in_a_quarter_of_the_memory(bitsandbytes: Path) -> None:
    named, plain = parameters(), parameters()
    optimizer = build("adamw8bit", named)
    run(optimizer, named, range(1, 6))
    run(build("adamw", plain), plain, range(1, 6))
    big, small = named["layer.weight"], named["layer.bias"]
    assert optimizer.state[big]["state1"].dtype == optimizer.state[big]["state2"].dtype == torch.uint8
    torch.testing.assert_close(small, plain["layer.bias"], rtol=1e-5, atol=1e-6)
    start = parameters()["layer.weight"]
    moved, expected = big.detach() - start.detach(), plain["layer.weight"].detach() - start.detach()
    assert torch.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.97
