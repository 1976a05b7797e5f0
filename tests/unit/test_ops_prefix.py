"""Shared prompts: the same numbers as rows that each carry their own copy, forward and backward, for fewer tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from tunewright.core.example import Example, Group
from tunewright.models.loader import load_model
from tunewright.models.policy import Policy
from tunewright.ops.attention import prefixes_of
from tunewright.ops.packing import collate
from tunewright.ops.prefix import n_tokens, share_prefixes
from tunewright.ops.types import Batch


def groups(prompts: tuple[int, ...] = (6, 1, 3, 9), size: int = 3) -> list[Group]:
    """Groups of `size` answers to prompts of these lengths; the third one has a target inside its prompt."""
    g = torch.Generator().manual_seed(0)

    def draw(n: int) -> list[int]:
        return torch.randint(3, 97, (n,), generator=g).tolist()

    made = []
    for k, length in enumerate(prompts):
        prompt, examples = draw(length), []
        for i in range(size):
            answer = draw(1 + (i * 3 + k) % 5)
            weights = [0.0] * length + [1.0 + i] * len(answer)
            if k == 2:
                weights[1] = 1.0
            examples.append(Example(tuple(prompt + answer), tuple(weights), source=k + 1))
        made.append(Group(tuple(examples), prefix=length))
    return made


def targets(batch: Batch, values_T: Tensor) -> dict[tuple[int, int], Tensor]:
    """(example, position) -> the value at that supervised token."""
    numbers = batch.per_segment.get("example", torch.arange(batch.n_segments))
    segment_T = torch.bucketize(torch.arange(batch.n_tokens), batch.cu_seqlens[1:].long(), right=True)
    return {
        (int(numbers[segment_T[t]]), int(batch.position_T[t])): values_T[t]
        for t in batch.weights_T.nonzero()[:, 0].tolist()
    }


def test_what_is_laid_out() -> None:
    shared = share_prefixes(groups((3,), 2))
    first, second = groups((3,), 2)[0].examples
    assert shared.tokens_T.tolist() == [*first.ids[:3], *first.ids[2:], *second.ids[2:]]
    assert shared.parent_S.tolist() == [-1, 0, 0]
    assert shared.per_segment["example"].tolist() == [-1, 0, 1]
    assert shared.position_T.tolist()[:5] == [0, 1, 2, 2, 3]
    assert shared.weights_T[:3].tolist() == [0, 0, 0]
    assert shared.group_S.tolist() == [0, 0, 0]


def test_every_target_keeps_its_token_and_weight_and_tokens_are_saved() -> None:
    alone, shared = collate(groups()), share_prefixes(groups())
    for name in ("targets_T", "weights_T"):
        a, b = targets(alone, getattr(alone, name)), targets(shared, getattr(shared, name))
        assert {k: v.item() for k, v in a.items()} == {k: v.item() for k, v in b.items()}
    assert shared.n_tokens < alone.n_tokens
    assert shared.n_tokens == sum(n_tokens(g) for g in groups())
    assert shared.parent_S.ge(0).sum() == 6  # the first and the last group; the others have nothing to share


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_statistics_and_gradients_are_those_of_whole_rows(family: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    policy = Policy(load_model(tiny.build_family(tmp_path / "m", family, tiny_model_dir)))

    def step(batch: Batch) -> tuple[dict[Any, float], dict[str, Tensor]]:
        logp_T = policy.token_stats(batch, {"logp"})["logp"]
        policy.model.zero_grad()
        (logp_T * batch.weights_T).sum().backward()
        values = {k: v.item() for k, v in targets(batch, logp_T).items()}
        return values, {k: p.grad.clone() for k, p in policy.model.named_parameters() if p.grad is not None}

    (alone, alone_grads), (shared, shared_grads) = step(collate(groups())), step(share_prefixes(groups()))
    assert shared == pytest.approx(alone, abs=1e-5)
    for k, grad in alone_grads.items():
        assert (shared_grads[k] - grad).norm() <= 1e-5 * grad.norm() + 1e-6, k


def test_a_branch_does_not_see_its_sister(tmp_path: Path, tiny_model_dir: Path) -> None:
    policy = Policy(load_model(tiny_model_dir))
    (group,) = groups((4,), 2)
    first, second = group.examples
    other = Example((*second.ids[:-1], 5), second.weights, second.source)
    with torch.no_grad():
        a, b = (policy.hidden(share_prefixes([Group((first, e), 4)])) for e in (second, other))
    end = 4 + len(first.ids) - 3
    assert torch.equal(a[:end], b[:end]) and not torch.equal(a[end:], b[end:])


@pytest.mark.parametrize("parent, start", [(1, 2), (0, 9)])
def test_a_parent_that_cannot_be_is_an_error(parent: int, start: int) -> None:
    batch = share_prefixes(groups((4,), 2))
    batch.parent_S[1] = parent
    batch.position_T[batch.cu_seqlens[1]] = start
    with pytest.raises(ValueError, match="cannot continue"):
        prefixes_of(batch)


def test_a_padded_model_refuses_parents(tmp_path: Path, tiny_model_dir: Path) -> None:
    policy = Policy(load_model(tiny.build_family(tmp_path / "m", "bloom", tiny_model_dir)))
    with pytest.raises(ValueError, match="cannot share"):
        policy.hidden(share_prefixes(groups()))
