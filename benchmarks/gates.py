"""Parity first: no speed is quoted before the rivals are seen to compute the same thing.

exact: float32 loss of the first step equal to transformers + peft to 1e-5. Then a few steps of everybody in the dtype
that is measured: same tokens and masks, same counts a step, gradient norms above 0 and within 2 % of the plain loop's
at step 1, losses within noise, held-out loss of the trained weights (one judge for all) within noise.

What noise is, the plain loop says itself: it runs in float32 too. Where LoRA's small first updates are added to outputs
that are kept in bfloat16, most of them is rounded away, and the losses lie up to 0.1 above the float32 ones; a loss
passes between the two curves, or CURVE beside them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.process import Outcome, Step

EXACT = 1e-5
GRADIENT = 0.02
# bfloat16 keeps 8 bits: the loss of a few hundred tokens moves by about 0.01 between float32 and bfloat16 activations
CURVE = 0.01
CURVE_WORST = 0.03
HELD_OUT = 0.01


@dataclass(frozen=True)
class Gate:
    """name: what was compared. ok: whether it passed. detail: the numbers."""

    name: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'} {self.name}: {self.detail}"


@dataclass(frozen=True)
class Tokens:
    """What the rows are to us: a hash over ids and masks, and the tokens and trained tokens of each step."""

    hash: str
    counts: list[tuple[int, int]]


def exact_gate(ours: Outcome, plain: Outcome) -> Gate:
    """The first step in float32: loss to 1e-5, gradient norm to 1e-3."""
    a, b = ours.steps[0], plain.steps[0]
    if None in (a.loss, b.loss, a.grad_norm, b.grad_norm):
        return Gate("float32 loss", False, "a loss or gradient norm is missing")
    off = abs(a.loss - b.loss)  # type: ignore[operator]
    turned = abs(a.grad_norm / b.grad_norm - 1)  # type: ignore[operator]
    detail = f"ours {a.loss:.7f}, plain {b.loss:.7f}, off by {off:.1e} (gradient norm by {turned:.1e})"
    return Gate("float32 loss", off <= EXACT and turned <= 1e-3, detail)


def parity_gates(
    runs: Mapping[str, Outcome], exact: list[Step], held_out: Mapping[str, float], tokens: Tokens
) -> list[Gate]:
    """All gates of the rivals in `runs` (with `plain` among them) against the plain loop. exact: its float32 steps.

    held_out: loss of what each trained, of `base`, and of `float32`, the plain loop in it.
    """
    gates = []
    reference = runs["plain"].steps
    for name, run in runs.items():
        gates += [token_gate(name, run, tokens), count_gate(name, run.steps, tokens)]
        gates += [gradient_gate(name, run.steps, reference)]
        if name != "plain":
            gates += [curve_gate(name, run.steps, (exact, reference)), held_out_gate(name, held_out)]
    return gates


def token_gate(name: str, run: Outcome, tokens: Tokens) -> Gate:
    """Rivals hash what they read; ours is hashed by the caller, from the renderer that the worker uses."""
    theirs = run.facts.get("token_hash", tokens.hash)
    return Gate(f"{name}: token ids and masks", theirs == tokens.hash, f"{theirs}, ours {tokens.hash}")


def count_gate(name: str, steps: list[Step], tokens: Tokens) -> Gate:
    got = [(s.tokens, s.supervised) for s in steps]
    same = got == tokens.counts
    return Gate(f"{name}: tokens of each step", same, f"{got if not same else sum(n for n, _ in got)}")


def gradient_gate(name: str, steps: list[Step], reference: list[Step]) -> Gate:
    mine, theirs = steps[0].grad_norm, reference[0].grad_norm
    if not mine or not theirs:
        return Gate(f"{name}: gradient norm", False, f"{mine} (plain {theirs})")
    off = abs(mine / theirs - 1)
    return Gate(f"{name}: gradient norm", off <= GRADIENT, f"{mine:.4f}, plain {theirs:.4f}, off by {off:.2%}")


def curve_gate(name: str, steps: list[Step], references: tuple[list[Step], list[Step]]) -> Gate:
    """How far each loss lies from where the two references' losses (or anything between them) are."""
    found = [[s.loss for s in curve] for curve in (steps, *references)]
    if len({len(losses) for losses in found}) > 1 or any(loss is None for losses in found for loss in losses):
        counts = " and ".join(str(len(losses)) for losses in found[1:])
        return Gate(f"{name}: losses", False, f"{len(steps)} steps against {counts}, or a loss is missing")
    off = [max(min(a, b) - mine, mine - max(a, b), 0.0) for mine, a, b in zip(*found, strict=True)]  # type: ignore[type-var]
    exact = statistics.median(abs(mine - a) for mine, a, _ in zip(*found, strict=True))  # type: ignore[operator]
    ok = statistics.median(off) <= CURVE and max(off) <= CURVE_WORST
    text = f"median outside by {statistics.median(off):.1e}, worst {max(off):.1e}; from float32 by {exact:.1e}"
    return Gate(f"{name}: losses", ok, text)


def held_out_gate(name: str, held_out: Mapping[str, float]) -> Gate:
    """Between the held-out losses of the plain loop's two results, or HELD_OUT beside them."""
    low, high = sorted((held_out["plain"], held_out["float32"]))
    ok = low - HELD_OUT <= held_out[name] <= high + HELD_OUT
    text = f"{held_out[name]:.4f}, plain {held_out['plain']:.4f}, in float32 {held_out['float32']:.4f}"
    return Gate(f"{name}: held-out loss", ok, f"{text}, base {held_out['base']:.4f}")
