"""The fast path of encoders gives the numbers of transformers' modules: loss and every gradient, however it is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

import tiny
from tunewright.core.example import Example, Group
from tunewright.models.bert import FastBert, serves
from tunewright.models.heads import Head
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy
from tunewright.objectives.classify import Classify
from tunewright.ops.kernels import Kernels
from tunewright.ops.packing import pack
from tunewright.train.loop import step_loss
from tunewright.tuners.full import Full
from tunewright.tuners.lora import LoRA

LENGTHS = (3, 17, 5, 4, 30, 9, 2, 11)
LABELS = ("a", "b", "c")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_reader(tmp_path_factory.mktemp("bert") / "bert", "bert")


def groups(first: int = 7) -> list[Group]:
    """Rows of different lengths; every second one is a pair of texts."""
    rows = []
    for i, n in enumerate(LENGTHS):
        ids = tuple((first + 13 * i + 5 * k) % 90 + 4 for k in range(n))
        types = tuple(int(k > n // 2) for k in range(n)) if i % 2 else ()
        example = Example(ids, (0.0,) * n, source=i, label=float(i % 3), **({"types": types} if types else {}))
        rows.append(Group((example,)))
    return rows


@pytest.fixture(scope="module")
def wide(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose sizes the AMX kernels take."""
    config = AutoConfig.from_pretrained(
        folder, hidden_size=64, num_attention_heads=2, intermediate_size=160, num_hidden_layers=3
    )
    torch.manual_seed(5)
    to = tmp_path_factory.mktemp("wide") / "bert"
    AutoModel.from_config(config).save_pretrained(to)
    AutoTokenizer.from_pretrained(folder).save_pretrained(to)
    return to


def trained(folder: Path, dtype: torch.dtype = torch.float32, kernels: Kernels | None = None) -> Policy:
    model: Any = Full(Full.Options()).attach(load_model(folder, torch.float32, Head("classify", LABELS, 1)), 0)
    model.train()
    policy = Policy(model, None if dtype == torch.float32 else dtype)
    if kernels is not None:
        assert serves(model, dtype)
        policy.fast = FastBert(model, dtype, kernels)
    return policy


def step(policy: Policy, rows: list[Group], budget: int = 10**6) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a step in micro-batches of `budget` tokens."""
    objective, total = Classify(Classify.Options()), 0.0
    policy.model.zero_grad(set_to_none=True)
    batches = pack(rows, budget)
    n = sum(objective.weights(b)["loss"] for b in batches)
    for batch in batches:
        loss = step_loss(objective(policy, batch), {"loss": n, "accuracy": n})
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


def same(found: tuple[float, dict[str, Tensor]], want: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(want[0], abs=1e-6)
    assert found[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_steps_are_those_of_the_modules(folder: Path, kernels: Kernels) -> None:
    plain, fast = trained(folder), trained(folder, kernels=kernels)
    for first in (7, 20, 41):  # the rows of the step before must not be left in the gradient of the words
        same(step(fast, groups(first)), step(plain, groups(first)))
    with torch.no_grad():
        batch = pack(groups(), 10**6)[0]
        torch.testing.assert_close(fast.scores(batch), plain.scores(batch))


@pytest.mark.parametrize("choice", ["none", "selective", "full"])
def test_any_cut_and_what_is_computed_again_is_the_same(folder: Path, kernels: Kernels, choice: str) -> None:
    whole, cut = trained(folder, kernels=kernels), trained(folder, kernels=kernels)
    cut.set_checkpointing(choice)
    same(step(cut, groups(), 20), step(whole, groups()))


def test_a_gradient_that_is_there_already_is_added_to(folder: Path, kernels: Kernels) -> None:
    policy = trained(folder, kernels=kernels)
    words: Any = policy.model.get_input_embeddings().weight  # type: ignore[operator]
    want = step(policy, groups())[1]["bert.embeddings.word_embeddings.weight"]
    policy.model.zero_grad(set_to_none=True)
    words.grad = torch.ones_like(words)
    terms = Classify(Classify.Options())(policy, pack(groups(), 10**6)[0])
    step_loss(terms, {"loss": len(LENGTHS)}).backward()
    torch.testing.assert_close(words.grad, want + 1)


def test_weights_that_changed_are_read_again(folder: Path, kernels: Kernels) -> None:
    plain, fast = trained(folder), trained(folder, kernels=kernels)
    step(fast, groups())
    for policy in (plain, fast):
        with torch.no_grad():
            for p in policy.model.parameters():
                p.mul_(1.1)
    same(step(fast, groups()), step(plain, groups()))


@pytest.mark.parametrize("sizes", ["folder", "wide"])
def test_in_bfloat16_the_error_is_that_of_rounding(
    request: pytest.FixtureRequest, kernels: Kernels, sizes: str
) -> None:
    """On torch's products, and where the sizes fit and the processor has them on tiles."""
    folder = request.getfixturevalue(sizes)
    exact = step(trained(folder), groups())
    errors = []
    for one in (kernels, None):
        policy = trained(folder, torch.bfloat16, one)
        if one is not None:
            assert policy.fast.tiles == (kernels.tiles and sizes == "wide")  # type: ignore[union-attr]
        loss, found = step(policy, groups())
        assert loss == pytest.approx(exact[0], abs=0.01)
        names = [n for n, g in exact[1].items() if g.norm() > 1e-4]
        errors.append(max(float((found[n] - exact[1][n]).norm() / exact[1][n].norm()) for n in names))
    assert errors[0] < max(0.03, 1.5 * errors[1])


def test_on_tiles_any_cut_is_near_the_whole(wide: Path, kernels: Kernels) -> None:
    """The rows of a step, cut, meet other padding; what is computed again is the same bit for bit."""
    whole, again = (trained(wide, torch.bfloat16, kernels) for _ in range(2))
    again.set_checkpointing("full")
    want, cut = step(whole, groups()), step(whole, groups(), 20)
    assert cut[0] == pytest.approx(want[0], abs=0.01)
    for name, gradient in want[1].items():
        assert float((cut[1][name] - gradient).norm()) <= 0.05 * float(gradient.norm()) + 1e-4, name
    found = step(again, groups())
    assert found[0] == want[0]
    assert all(torch.equal(found[1][name], gradient) for name, gradient in want[1].items())


def lora(folder: Path) -> nn.Module:
    return LoRA(LoRA.Options.model_validate({})).attach(
        load_model(folder, torch.float32, Head("classify", LABELS, 1)), 0
    )


def test_what_it_does_not_serve(folder: Path) -> None:
    model = trained(folder).model
    assert serves(model, torch.bfloat16) and not serves(model, torch.float16)
    assert not serves(lora(folder), torch.float32)
    next(model.parameters()).requires_grad_(False)
    assert not serves(model, torch.float32)
    tanh: Any = trained(folder).model
    tanh.config.hidden_act = "gelu_new"
    assert not serves(tanh, torch.float32)
