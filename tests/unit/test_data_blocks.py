"""Blocks of plain text: every token is predicted once, no text sees another unless asked, memory stays small."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tunewright.core.conversation import Conversation
from tunewright.core.example import Example, Group
from tunewright.data.blocks import OPEN, in_blocks
from tunewright.data.render import RenderReport, render_rows
from tunewright.data.tokenizer import Tokenizer
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy
from tunewright.objectives.pretrain import Pretrain
from tunewright.ops.packing import collate, pack

N = 16


def text(source: int, length: int) -> Example:
    """Token ids that say which text and which place they come from."""
    return Example(tuple(1000 * source + i for i in range(length)), (0.0, *[1.0] * (length - 1)), source)


def texts(n: int = 120, longest: int = 3 * N) -> list[Example]:
    rng = random.Random(0)
    return [text(i, rng.randint(1, longest)) for i in range(1, n + 1)]


def predicted(groups: list[Group]) -> Counter[tuple[int, int]]:
    """How often each token is a target after each other one."""
    return Counter(
        pair
        for g in groups
        for e in g.examples
        for pair, w in zip(zip(e.ids, e.ids[1:], strict=False), e.weights[1:], strict=True)
        if w
    )


@pytest.mark.parametrize("n", [2, 3, N])
def test_separate_predicts_each_token_once_from_its_own_text(n: int) -> None:
    given = texts()
    groups = list(in_blocks(iter(given), n, "separate"))
    assert predicted(groups) == Counter(p for e in given for p in zip(e.ids, e.ids[1:], strict=False))
    assert all(2 <= len(e.ids) <= n and e.weights[0] == 0 for g in groups for e in g.examples)
    assert all(g.n_tokens <= n for g in groups)


def test_separate_cuts_no_text_that_fits_and_wastes_little() -> None:
    given = texts(300, N)
    groups = list(in_blocks(iter(given), N, "separate"))
    assert Counter(e.ids for g in groups for e in g.examples) == Counter(e.ids for e in given if len(e.ids) > 1)
    assert sum(g.n_tokens for g in groups) > 0.95 * N * (len(groups) - 1)


def test_joined_is_one_stream_cut_every_n_tokens() -> None:
    given = texts()
    groups = list(in_blocks(iter(given), N, "joined"))
    stream = [i for e in given for i in e.ids]
    assert predicted(groups) == Counter(pairwise(stream))
    assert all(len(g.examples) == 1 and g.n_tokens == N for g in groups[:-1]) and 2 <= groups[-1].n_tokens <= N


@pytest.mark.parametrize("documents", ["separate", "joined"])
def test_few_blocks_are_open_and_the_last_group_has_the_last_text(documents: str) -> None:
    read = 0

    def counted() -> object:
        nonlocal read
        for read, e in enumerate(texts(2000, N), 1):  # noqa: B007
            yield e

    groups = in_blocks(counted(), N, documents)  # type: ignore[arg-type]
    next(groups)
    assert read < OPEN * N
    last = Group(())
    for last in groups:  # noqa: B007
        pass
    assert max(e.source for e in last.examples) == 2000


@pytest.mark.parametrize("documents", ["separate", "joined"])
def test_rendered_texts_end_with_the_end_token(tiny_model_dir: Path, documents: str) -> None:
    tokenizer = Tokenizer.load(tiny_model_dir)
    rows = [Conversation(text=f"It is red {i}. " * (1 + i % 3), source=i) for i in range(1, 9)]
    report = RenderReport()
    groups = list(
        render_rows(rows, tokenizer, shape="text", max_length=12, report=report, documents=documents)  # type: ignore[arg-type]
    )
    alone = [e for g in render_rows(rows, tokenizer, shape="text", max_length=999) for e in g.examples]
    ends = sum(n for (_, token), n in predicted(groups).items() if token == tokenizer.eos_id)
    assert ends == len(rows) == sum(e.ids[-1] == tokenizer.eos_id for e in alone)
    assert report.rows == 8 and report.cut == sum(len(e.ids) > 12 for e in alone) > 0
    assert any("were cut into pieces because they are longer than 12 tokens" in note for note in report.notes)
    assert sum(len(e.weights) - 1 for g in groups for e in g.examples) == report.supervised_tokens


def test_a_text_in_a_block_is_the_text_alone(tiny_model_dir: Path) -> None:
    """Loss and gradient of blocks are those of the texts one by one."""
    policy, objective = Policy(load_model(tiny_model_dir)), Pretrain(Pretrain.Options())
    rng = random.Random(1)
    given = [Example(tuple(rng.randrange(470) for _ in range(n)), (0.0, *[1.0] * (n - 1)), n) for n in (3, 9, 5, 12, 7)]
    blocks = list(in_blocks(iter(given), 16, "separate"))
    assert len(blocks) < len(given)
    totals = []
    for batches in ([collate(blocks)], [b for e in given for b in pack([Group((e,))], 10**6)]):
        policy.model.zero_grad()
        total = sum(objective(policy, b)["loss"].total for b in batches)
        total.backward()  # type: ignore[union-attr]
        grads = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
        totals.append((total.item(), grads))  # type: ignore[union-attr]
    (a, grad_a), (b, grad_b) = totals
    assert a == pytest.approx(b, rel=1e-6) and (grad_a - grad_b).norm() < 1e-5 * grad_b.norm()
