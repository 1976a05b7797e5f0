"""Quantities per supervised token from hidden states and the LM head, in chunks of rows: [T, V] never exists.

Everything after the product with the head is float32. Gradients come back through recomputation of each chunk, or, in
the common case (only log-probs wanted, frozen head), from a gradient kept at the forward: one product less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tunewright.ops.kernels import Kernels, addresses

CHUNK = 256
STATS = ("logp", "correct", "entropy", "mean_logp")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
# as options name them
KINDS = {"forward": "forward_kl", "reverse": "reverse_kl", "jsd": "jsd"}


@dataclass(frozen=True)
class Head:
    """The LM head: logits = cap * tanh(scale * (h @ weight.T + bias) / cap).

    weight: [V, D]. bias: [V] or None. scale: a factor on the logits. softcap: None, or the cap (Gemma 2).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, h_ND: Tensor) -> Tensor:
        """[N, V] float32."""
        z_NV = F.linear(h_ND, self.weight.to(h_ND.dtype), self.bias).float()
        if self.scale != 1.0:
            z_NV = z_NV * self.scale
        return z_NV if self.softcap is None else torch.tanh(z_NV / self.softcap) * self.softcap

    @property
    def is_plain_and_frozen(self) -> bool:
        trained = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        return not trained and self.softcap is None


class TileHead:
    """A plain LM head for the AMX kernels: log-probs in one pass over the vocabulary, never [N, V].

    weight: [V, D], D a multiple of 32; its bfloat16 values count. scale: a factor on the logits. refresh() takes over
    a trained weight that is not bfloat16 itself.
    """

    def __init__(self, kernels: Kernels, weight: Tensor, scale: float) -> None:
        self.kernels, self.weight, self.scale = kernels, weight, float(scale)
        self.size, self.d = weight.shape
        self.rows = -(-self.size // 32) * 32
        self._plain = weight.detach().to(torch.bfloat16).contiguous()
        self._tail = self._plain.new_zeros(self.rows - self.size // 16 * 16, self.d)
        self._table = torch.cat([addresses(self._plain[: self.size // 16 * 16]), addresses(self._tail)])
        self._fill_tail()

    def refresh(self) -> None:
        """Take over the weight's present values."""
        if self._plain.data_ptr() != self.weight.data_ptr():
            self._plain.copy_(self.weight.detach())
        self._fill_tail()

    def _fill_tail(self) -> None:
        """The last rows in memory of their own, where zeros follow them."""
        rest = self.size % 16
        self._tail[:rest] = self._plain[self.size - rest :]

    def _parts(self) -> tuple[Tensor, int, int]:
        return self._table, self.d, self.size

    def stats(self, h_ND: Tensor, targets_N: Tensor, with_grad: bool, rest: bool) -> tuple[Tensor, ...]:
        """(logp, correct, entropy, mean_logp, log-sum-exp: [N] float32, d logp / d h: [N, D]).

        rest: whether entropy and mean_logp are wanted; what is not wanted is empty.
        """
        n = h_ND.shape[0]
        h, targets = _padded(h_ND.detach()), _padded(targets_N)
        rows = h.shape[0]
        stats = [torch.empty(rows if i not in (2, 3) or rest else 0) for i in range(5)]
        grad = torch.empty(rows if with_grad else 0, self.d, dtype=h.dtype)
        to = (*stats[:2], *(stats[2:4] if rest else (None, None)), stats[4], grad if with_grad else None)
        self.kernels("vocabulary_tiles", h, rows, self.d, *self._parts(), targets, self.scale, *to)
        return *(s[:n] for s in stats), grad[:n]

    def gradients(self, h_ND: Tensor, targets_N: Tensor, lse_N: Tensor, factor_N: Tensor) -> tuple[Tensor, Tensor]:
        """(dh [N, D], dweight [V, D] float32) of sum(factor * logp)."""
        n = h_ND.shape[0]
        h, targets, lse, factor = map(_padded, (h_ND, targets_N, lse_N, factor_N.float()))
        rows = h.shape[0]
        along, dw = torch.empty_like(h), torch.zeros(self.rows, self.d)
        self.kernels("pack_tiles", along, h, self.d, self.d, rows, 0)
        dh = torch.zeros(self.kernels.threads, rows, self.d)
        given = (*self._parts(), targets, self.scale, lse, factor, along)
        self.kernels("vocabulary_backward_tiles", h, rows, self.d, *given, dh, dw)
        return dh.sum(0)[:n].to(h_ND.dtype), dw[: self.size]


def _padded(x: Tensor) -> Tensor:
    """x with rows of zeros up to a multiple of 32, contiguous."""
    missing = -x.shape[0] % 32
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x.contiguous()


class _TileLogp(torch.autograd.Function):
    """logp and correct through a TileHead that is frozen: the gradient is formed in the forward."""

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, tiles: TileHead, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        logp, correct, _, _, _, grad_ND = tiles.stats(h_ND, targets_N, True, False)
        ctx.mark_non_differentiable(correct)
        ctx.save_for_backward(grad_ND)
        return logp, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_ND,) = ctx.saved_tensors
        return grads[0][:, None].to(grad_ND.dtype) * grad_ND, None, None


class _TrainedTileLogp(torch.autograd.Function):
    """logp and correct through a TileHead whose weight is trained: the logits are computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, weight_VD: Tensor, tiles: TileHead, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        logp, correct, _, _, lse, _ = tiles.stats(h_ND, targets_N, False, False)
        ctx.mark_non_differentiable(correct)
        ctx.save_for_backward(h_ND, targets_N, lse)
        ctx.tiles = tiles
        return logp, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        h_ND, targets_N, lse_N = ctx.saved_tensors
        dh, dw = ctx.tiles.gradients(h_ND, targets_N, lse_N, grads[0])
        return dh, dw, None, None


def token_stats(
    h_ND: Tensor,
    head: Head,
    targets_N: Tensor,
    want: set[str],
    chunk: int = CHUNK,
    tiles: TileHead | None = None,
) -> dict[str, Tensor]:
    """{name: [N] float32} for rows that are supervised. tiles: the same head packed, if there is one.

    logp: log p(target). correct: 1.0 where the target is the most likely token (no gradient).
    entropy: -sum p log p, in nats. mean_logp: mean of log p over the vocabulary (label smoothing).
    Raises ValueError for a name that is not in STATS.
    """
    unknown = want - set(STATS)
    if unknown:
        raise ValueError(f"no such token statistic: {', '.join(sorted(unknown))}; there are: {', '.join(STATS)}")
    names = sorted(want)
    with_grad = torch.is_grad_enabled() and (h_ND.requires_grad or head.weight.requires_grad)
    with_tiles = tiles is not None and h_ND.dtype == torch.bfloat16 and h_ND.shape[0] > 0
    if tiles is not None and with_tiles and (not with_grad or want <= {"logp", "correct"}):
        found = _through_tiles(h_ND, tiles, targets_N, with_grad, not want <= {"logp", "correct"})
        return {name: values for name, values in zip(STATS, found, strict=False) if name in want}
    if want <= {"logp", "correct"} and head.is_plain_and_frozen and with_grad:
        logp_N, correct_N = _FrozenHeadLogp.apply(h_ND, head, targets_N, chunk)
        return {name: {"logp": logp_N, "correct": correct_N}[name] for name in names}

    def part(h: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return _chunk_stats(head.logits(h), targets, names)

    return dict(zip(names, _in_chunks(part, (h_ND, targets_N), len(names), chunk), strict=True))


def _through_tiles(h_ND: Tensor, tiles: TileHead, targets_N: Tensor, with_grad: bool, rest: bool) -> tuple[Tensor, ...]:
    """The statistics in the order of STATS, as far as they are wanted."""
    if not with_grad:
        return tiles.stats(h_ND, targets_N, False, rest)
    if tiles.weight.requires_grad:
        return _TrainedTileLogp.apply(h_ND, tiles.weight, tiles, targets_N)  # type: ignore[no-any-return]
    return _TileLogp.apply(h_ND, tiles, targets_N)  # type: ignore[no-any-return]


def compare(
    h_ND: Tensor,
    head: Head,
    teacher_h_ND: Tensor,
    teacher_head: Head,
    targets_N: Tensor,
    want: set[str],
    kind: str,
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> dict[str, Tensor]:
    """{name: [N] float32}, gradient to the student only. want: `divergence` and names of STATS, of the student.

    forward_kl: KL(teacher || student). reverse_kl: KL(student || teacher). jsd: beta KL(teacher || m) +
    (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student, 0 < beta < 1 (Agarwal et al. 2024, arXiv
    2306.13649, equation 1). temperature: both models' logits are divided by it, for the divergence only.
    Raises ValueError for another kind or statistic, or for vocabularies of different sizes.
    """
    if kind not in DIVERGENCES:
        raise ValueError(f"no such divergence: {kind}; there are: {', '.join(DIVERGENCES)}")
    if head.weight.shape[0] != teacher_head.weight.shape[0]:
        raise ValueError(
            f"student and teacher have vocabularies of {head.weight.shape[0]} and {teacher_head.weight.shape[0]} tokens"
        )

    names = sorted(want - {"divergence"})
    if unknown := set(names) - set(STATS):
        raise ValueError(f"no such token statistic: {', '.join(sorted(unknown))}; there are: {', '.join(STATS)}")

    def part(h: Tensor, teacher_h: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            teacher = F.log_softmax(teacher_head.logits(teacher_h) / temperature, dim=-1)
        z = head.logits(h)
        far = divergence_of(F.log_softmax(z / temperature, dim=-1), teacher, kind, beta)
        return (far, *(_chunk_stats(z, targets, names) if names else ()))

    found = _in_chunks(part, (h_ND, teacher_h_ND.detach(), targets_N), 1 + len(names), chunk)
    return {name: values for name, values in zip(("divergence", *names), found, strict=True) if name in want}


def first_tokens(head: Head, n: int) -> Head:
    """The head over the first n tokens of its vocabulary."""
    if head.weight.shape[0] == n:
        return head
    return replace(head, weight=head.weight[:n], bias=None if head.bias is None else head.bias[:n])


def _in_chunks(
    part: Callable[..., tuple[Tensor, ...]], rows: tuple[Tensor, ...], n_out: int, chunk: int
) -> tuple[Tensor, ...]:
    """Apply `part` to blocks of rows, remembering only its inputs for the backward."""
    n = rows[0].shape[0]
    if n == 0:
        empty = rows[0].float().sum(-1)  # [0], still connected to the graph
        return (empty,) * n_out
    outs = [
        checkpoint(part, *(r[i : i + chunk] for r in rows), use_reentrant=False, preserve_rng_state=False)
        for i in range(0, n, chunk)
    ]
    return tuple(torch.cat(parts) for parts in zip(*outs, strict=True))


def _chunk_stats(z_NV: Tensor, targets_N: Tensor, names: list[str]) -> tuple[Tensor, ...]:
    logp_NV = F.log_softmax(z_NV, dim=-1)
    formulas: dict[str, Callable[[], Tensor]] = {
        "logp": lambda: logp_NV.gather(-1, targets_N[:, None])[:, 0],
        "correct": lambda: (logp_NV.argmax(-1) == targets_N).float(),
        "entropy": lambda: -(logp_NV.exp() * logp_NV).sum(-1),
        "mean_logp": lambda: logp_NV.mean(-1),
    }
    return tuple(formulas[name]() for name in names)


def divergence_of(student_NV: Tensor, teacher_NV: Tensor, kind: str, beta: float = 0.5) -> Tensor:
    """[N] in nats, from log-probabilities. kind, beta: as in `compare`."""

    def kl(a_NV: Tensor, b_NV: Tensor) -> Tensor:
        return (a_NV.exp() * (a_NV - b_NV)).sum(-1)

    if kind == "forward_kl":
        return kl(teacher_NV, student_NV)
    if kind == "reverse_kl":
        return kl(student_NV, teacher_NV)
    mixture_NV = torch.logaddexp(student_NV + math.log1p(-beta), teacher_NV + math.log(beta))
    return beta * kl(teacher_NV, mixture_NV) + (1 - beta) * kl(student_NV, mixture_NV)


class _FrozenHeadLogp(torch.autograd.Function):
    """logp and correct with a frozen head.

    d logp_n / d h_n = scale * (onehot(y_n) - p_n) @ W needs no incoming gradient but a factor per row, so it is
    computed at the forward, while the chunk's probabilities are at hand, and kept: [N, D] instead of [N, V].
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, h_ND: Tensor, head: Head, targets_N: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        logps, corrects, grads = [], [], []
        weight_VD = head.weight.to(h_ND.dtype)
        for i in range(0, h_ND.shape[0], chunk):
            h, y = h_ND[i : i + chunk], targets_N[i : i + chunk]
            # the very operations of _chunk_stats, so that a pass without gradient gives the same bits
            logp_NV = F.log_softmax(head.logits(h), dim=-1)
            logps.append(logp_NV.gather(-1, y[:, None])[:, 0])
            corrects.append((logp_NV.argmax(-1) == y).float())
            p_NV = logp_NV.exp_()
            p_NV[torch.arange(len(y), device=y.device), y] -= 1.0  # before rounding: p[y] may be near 1
            grads.append(-head.scale * (p_NV.to(weight_VD.dtype) @ weight_VD))
        correct_N = torch.cat(corrects) if corrects else h_ND.new_zeros(0, dtype=torch.float32)
        ctx.mark_non_differentiable(correct_N)  # type: ignore[attr-defined]
        ctx.save_for_backward(torch.cat(grads) if grads else h_ND.detach())  # type: ignore[attr-defined]
        return (torch.cat(logps) if logps else h_ND.new_zeros(0, dtype=torch.float32)), correct_N

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_ND,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0][:, None].to(grad_ND.dtype) * grad_ND, None, None, None
