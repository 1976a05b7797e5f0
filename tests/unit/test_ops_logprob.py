"""Chunked statistics = the full log-softmax, with gradients, for every head; and they never hold [T, V]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tunewright.ops import logprob
from tunewright.ops.logprob import DIVERGENCES, STATS, Head

N, D, V = 11, 6, 17


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    h = torch.randn(N, D, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, generator=g, dtype=dtype)
    bias = torch.randn(V, generator=g, dtype=dtype)
    return h, weight, bias, torch.randint(V, (N,), generator=g)


HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "scale": 2.0, "softcap": 5.0},
}


def make_head(kind: str, weight: Tensor, bias: Tensor) -> Head:
    options = dict(HEADS[kind])
    return Head(weight, bias if options.pop("bias", False) else None, **options)  # type: ignore[arg-type]


def full_logits(h: Tensor, head: Head) -> Tensor:
    z = h @ head.weight.T + (0 if head.bias is None else head.bias)
    z = z * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def full_stats(h: Tensor, head: Head, targets: Tensor) -> dict[str, Tensor]:
    z = full_logits(h, head)
    p = z.softmax(-1)
    return {
        "logp": torch.stack([F.log_softmax(z[i], 0)[t] for i, t in enumerate(targets)]),
        "correct": (z.argmax(-1) == targets).float(),
        "entropy": torch.distributions.Categorical(probs=p).entropy(),
        "mean_logp": p.log().mean(-1),
    }


@pytest.mark.parametrize("chunk", [1, 4, 11, 256])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("want", [{"logp"}, {"logp", "correct"}, set(STATS)])
def test_equals_full_log_softmax(chunk: int, kind: str, trained: bool, want: set[str]) -> None:
    h, weight, bias, targets = tensors()
    weight.requires_grad_(trained)
    head = make_head(kind, weight, bias)
    got = logprob.token_stats(h, head, targets, want, chunk)
    expected = full_stats(h, head, targets)
    assert set(got) == want
    for name in want:
        torch.testing.assert_close(got[name], expected[name], atol=2e-6, rtol=1e-5)
    factors = {"logp": torch.linspace(-1, 2, N), "entropy": torch.linspace(1, 3, N), "mean_logp": torch.ones(N)}
    over = [h, weight] if trained else [h]

    def grads(values: dict[str, Tensor]) -> tuple[Tensor, ...]:
        loss = torch.stack([(values[k] * f).sum() for k, f in factors.items() if k in want]).sum()
        return torch.autograd.grad(loss, over)

    for a, b in zip(grads(got), grads(expected), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_frozen_head_gradient_by_finite_differences() -> None:
    h, weight, _, targets = tensors()
    head = Head(weight, scale=1.5)
    (grad,) = torch.autograd.grad(logprob.token_stats(h, head, targets, {"logp"}, 4)["logp"].sum(), h)
    h64, head64, eps = h.detach().double(), Head(weight.double(), scale=1.5), 1e-6
    for i, j in ((0, 0), (5, 3), (10, 5)):
        shift = torch.zeros_like(h64)
        shift[i, j] = eps
        up, down = (full_stats(x, head64, targets)["logp"].sum() for x in (h64 + shift, h64 - shift))
        assert grad[i, j].item() == pytest.approx(((up - down) / (2 * eps)).item(), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("beta", "temperature"), [(0.5, 1.0), (0.1, 2.5)])
@pytest.mark.parametrize("chunk", [3, 256])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergences(kind: str, chunk: int, beta: float, temperature: float) -> None:
    h, weight, bias, targets = tensors()
    teacher_h = torch.randn(N, 9, generator=torch.Generator().manual_seed(5)).requires_grad_()
    head, teacher = Head(weight, bias), Head(torch.randn(V, 9, generator=torch.Generator().manual_seed(6)))
    want = {"divergence", "logp"}
    both = logprob.compare(h, head, teacher_h, teacher, targets, want, kind, beta, temperature, chunk)
    got, logp = both["divergence"], full_logits(h, head).log_softmax(-1)
    torch.testing.assert_close(both["logp"], logp.gather(-1, targets[:, None])[:, 0], atol=1e-5, rtol=1e-4)
    p = (full_logits(teacher_h.detach(), teacher) / temperature).softmax(-1)
    q = (full_logits(h, head) / temperature).softmax(-1)
    m = beta * p + (1 - beta) * q

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    jsd = beta * kl(p, m) + (1 - beta) * kl(q, m)
    far = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": jsd}[kind]
    torch.testing.assert_close(got, far, atol=1e-5, rtol=1e-4)
    of_teacher = torch.autograd.grad(got.sum(), teacher_h, allow_unused=True, retain_graph=True)[0]
    assert of_teacher is None
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), h)[0], torch.autograd.grad(far.sum(), h)[0], atol=1e-5, rtol=1e-4
    )


def test_the_generalised_jsd_lies_between_both_kl() -> None:
    """Divided by beta (1 - beta), near 0 and 1 it is KL(teacher || student) and KL(student || teacher)."""
    generator = torch.Generator().manual_seed(3)
    teacher, student = (torch.randn(4, V, generator=generator).double().log_softmax(-1) for _ in range(2))
    for beta, kind in ((1e-4, "forward_kl"), (1 - 1e-4, "reverse_kl")):
        near = logprob.divergence_of(student, teacher, "jsd", beta) / (beta * (1 - beta))
        torch.testing.assert_close(near, logprob.divergence_of(student, teacher, kind), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_and_without_gradient_the_bits_are_the_same(dtype: torch.dtype) -> None:
    """A reference pass without gradient must equal the policy's own pass, or DPO would not begin at ln 2."""
    h, weight, _, targets = tensors()
    h, head = h.detach().to(dtype).requires_grad_(), Head(weight.to(dtype))
    want = {"logp", "correct"}
    learning = logprob.token_stats(h, head, targets, want, 4)
    with torch.no_grad():
        looking = logprob.token_stats(h, head, targets, want, 4)
    everything = logprob.token_stats(h, head, targets, set(STATS), 4)
    for name in want:
        assert torch.equal(learning[name], looking[name]) and torch.equal(looking[name], everything[name])


def test_no_supervised_row_gives_empty_and_zero_gradient() -> None:
    h, weight, _, _ = tensors()
    for want in ({"logp"}, set(STATS)):
        got = logprob.token_stats(h[:0], Head(weight), torch.zeros(0, dtype=torch.int64), want)
        assert {v.numel() for v in got.values()} == {0}
        assert torch.autograd.grad(got["logp"].sum(), h)[0].abs().sum() == 0


def test_without_gradient_nothing_is_kept() -> None:
    h, weight, _, targets = tensors()
    with torch.no_grad():
        got = logprob.token_stats(h, Head(weight), targets, {"logp", "correct"})
    assert not got["logp"].requires_grad
    torch.testing.assert_close(got["logp"], full_stats(h, Head(weight), targets)["logp"])


@pytest.mark.parametrize("trained", [False, True])
def test_memory_is_a_chunk_not_the_vocabulary(trained: bool) -> None:
    """The largest tensor made in forward and backward is chunk x V (or the head's own gradient), never rows x V."""
    rows, vocab, chunk = 512, 1024, 64
    h = torch.randn(rows, 8, requires_grad=True)
    head = Head(torch.randn(vocab, 8, requires_grad=trained))
    nowhere = torch.zeros(rows, dtype=torch.int64)
    assert (
        0 < largest_tensor(lambda: logprob.token_stats(h, head, nowhere, {"logp", "correct"}, chunk)) <= chunk * vocab
    )
    teacher = Head(torch.randn(vocab, 8))
    want = {"divergence", "logp", "correct"}
    beside = h.detach().clone()
    compared = largest_tensor(lambda: logprob.compare(h, head, beside, teacher, nowhere, want, "jsd", chunk=chunk))
    assert 0 < compared <= chunk * vocab


def largest_tensor(work: Callable[[], dict[str, Tensor]]) -> int:
    """Elements of the largest tensor that `work` and the backward of its log-probabilities make."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                largest = max(largest, t.numel() if isinstance(t, Tensor) else 0)
            return out

    with Watch():
        found = work()
        sum(found[k] for k in ("logp", "divergence") if k in found).sum().backward()  # type: ignore[union-attr]
    return largest


def test_bad_names_and_vocabularies_are_errors() -> None:
    h, weight, _, targets = tensors()
    with pytest.raises(ValueError, match="no such token statistic: logits"):
        logprob.token_stats(h, Head(weight), targets, {"logits"})
    with pytest.raises(ValueError, match="no such divergence"):
        logprob.compare(h, Head(weight), h, Head(weight), targets, {"divergence"}, "hellinger")
    with pytest.raises(ValueError, match="17 and 16 tokens"):
        less = replace(Head(weight), weight=weight[:-1])
        logprob.compare(h, Head(weight), h, less, targets, {"divergence"}, "jsd")
