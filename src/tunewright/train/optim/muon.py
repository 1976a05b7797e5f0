"""Muon for the matrices between embedding and head, AdamW for everything else: one optimizer object."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from tunewright.train.optim.base import Card, Options, decay_groups

# parts of the names of embeddings and heads: tables of rows, not maps between hidden spaces
# (and columns of single entries that a tuner has selected)
NOT_HIDDEN = (".selected", "embed", "wte", "wpe", "lm_head", "shared", "classifier", "score", "head.")


class Muon:
    """Muon (Jordan et al. 2024): orthogonalised momentum, for full fine-tuning; vectors, embeddings and head by AdamW.

    Its steps have the size of AdamW's (Moonlight, arXiv 2502.16982, section 2.2), so one rate and one decay fit both.
    """

    class Options(Options):
        weight_decay: float = Field(0.0, ge=0, le=1, description="decoupled; matrices only")
        momentum: float = Field(0.95, ge=0, lt=1, description="memory of the gradient")
        nesterov: bool = Field(True, description="look ahead along the momentum")
        ns_steps: int = Field(5, ge=1, le=20, description="Newton-Schulz iterations of the orthogonalisation")
        adjust: Literal["match_rms_adamw", "original"] = Field(
            "match_rms_adamw",
            description="factor on the rate by a matrix's shape: 0.2 sqrt(longer side), or Muon's sqrt(rows / columns)",
        )
        beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's, for the rest")
        beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's, for the rest")
        eps: float = Field(1e-8, gt=0, description="AdamW's, for the rest")

    card: ClassVar[Card] = Card("Muon with AdamW")

    @staticmethod
    def build(parameters: dict[str, nn.Parameter], lr: float, options: Any) -> torch.optim.Optimizer:
        hidden = {n: p for n, p in parameters.items() if is_hidden_matrix(n, p)}
        rest = {n: p for n, p in parameters.items() if n not in hidden}
        parts: list[torch.optim.Optimizer] = []
        if hidden:
            parts.append(
                torch.optim.Muon(
                    list(hidden.values()),
                    lr=lr,
                    weight_decay=options.weight_decay,
                    momentum=options.momentum,
                    nesterov=options.nesterov,
                    ns_steps=options.ns_steps,
                    adjust_lr_fn=options.adjust,
                )
            )
        if rest:
            groups = decay_groups(rest, options.weight_decay)
            betas = (options.beta1, options.beta2)
            parts.append(torch.optim.AdamW(groups, lr=lr, betas=betas, eps=options.eps, fused=True))
        return Together(parts)


def is_hidden_matrix(name: str, p: nn.Parameter) -> bool:
    """Whether Muon updates this parameter."""
    return p.ndim == 2 and not any(part in name for part in NOT_HIDDEN)


class Together(torch.optim.Optimizer):
    """Several optimizers over different parameters as one: the groups are theirs, and they share one state."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        super().__init__([p for part in parts for g in part.param_groups for p in g["params"]], {})
        self.parts = parts
        self.param_groups = [g for part in parts for g in part.param_groups]
        for part in parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for part in self.parts:
            part.step()
