"""EWC: what matters to the retained rows is held in its place, the rest is free (Kirkpatrick et al. 2017, 1612.00796).

F_i = sum_n (d log p(y_n | x_n) / d theta_i)^2 / sum_n w_n at the start, over rows n of weight w_n: supervised tokens,
for a head for rows 1. The paper divides by the number of rows. Divided by the weight, the penalty is in the unit of the
loss, nats a token, whatever the rows' lengths: with the whole matrix F in place of its diagonal it would be coefficient
times the KL from the start (Pascanu & Bengio 2013, arXiv 1301.3584).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunewright.core.durable import commit_folder
from tunewright.core.errors import Diverged, SpecError
from tunewright.models.layouts import causal_lm
from tunewright.models.policy import Policy
from tunewright.ops.runtime import derive_seed
from tunewright.ops.types import Batch
from tunewright.train.prepare import is_kept, one_row_at_a_time, row_gradients
from tunewright.train.retain import base
from tunewright.train.retain.base import Given, RetainCard, pull_back, snapshot

FILE = "fisher.safetensors"
# for _to_nll: the squared error is twice that of a normal distribution of variance 1
TO_NLL = {"lm": 1.0, "classify": 1.0, "regress": 0.5, "reward": 1.0}


class EWC(base.Retain):
    """Adds coefficient / 2 * sum_i F_i (theta_i - theta_0,i)^2 over what is trained (equation 3, coefficient lambda).

    Over the trained parameters, not the weights below an adapter: one formula for every tuner, and F is as small as
    what is trained. A fresh LoRA has B = 0, so its update is B A_0 to first order: the Fisher of B is that of the
    update in these coordinates, and that of A is 0.
    """

    class Options(base.Options):
        file: str | None = Field(None, description="retained rows: a path (command line) or a file id (HTTP)")
        coefficient: float = Field(1000.0, gt=0, le=1e9, description="lambda of the paper")
        labels: Literal["data", "sampled"] = Field(
            "data",
            description="of the Fisher: the rows' own (empirical Fisher), or drawn from the model (unbiased)",
        )
        examples: int = Field(256, ge=1, le=1_000_000, description="retained rows that it is measured on")

    card: ClassVar[RetainCard] = RetainCard(title="Elastic weight consolidation", rows="required", copies=2)

    def begin(self, given: Given) -> None:
        """The Fisher is measured once in a job and kept in the run folder. Raises Interrupted, Diverged, SpecError."""
        if given.objective.card.head == "reward" and self.options.labels == "sampled":
            raise SpecError(
                "retain 'ewc', option labels: 'sampled' draws labels, and a reward model's rows are pairs; use 'data'.",
                param="retain",
            )
        self._parameters, self._start = given.tuner.trainable(), snapshot(given.tuner)
        if not is_kept(given.folder, "Fisher information", given.events):
            measured = fisher(given, self.options.examples, self.options.labels == "sampled", self.key)
            commit_folder(given.folder, partial(_save, measured))
        device = given.policy.device
        # copied: the file is only mapped, and its pages would not count as this process's memory
        self._fisher = {name: f.to(device, copy=True) for name, f in load_file(given.folder / FILE).items()}

    def pull(self) -> float:
        return pull_back(self._parameters, self._start, self.options.coefficient, self._fisher)


def fisher(given: Given, examples: int, sampled: bool, key: str) -> dict[str, Tensor]:
    """{name: F} of everything that is trained, float32, one row at a time. Raises Interrupted, Diverged."""
    head = given.objective.card.head
    parameters = given.tuner.trainable()
    squares = {name: torch.zeros_like(p) for name, p in parameters.items()}
    weight = 0.0

    def watched(batch: Batch, row: int) -> Batch:
        nonlocal weight
        weight += given.objective.weights(batch)["loss"]
        seed = derive_seed("fisher", key, given.seed, row)
        return with_drawn_labels(given.policy, batch, head, seed) if sampled else batch

    rows = row_gradients(
        given.policy, given.objective, given.rows, given.seed, given.events, given.stop, examples,
        doing="Measuring what matters to the retained rows", phase="fisher", change=watched,
    )  # fmt: skip
    with one_row_at_a_time(given.policy), given.tuner.all_trained():
        for _ in rows:
            for name, p in parameters.items():
                if p.grad is not None:
                    squares[name].addcmul_(p.grad, p.grad)
                    p.grad = None
    found = {name: f.mul_(_to_nll(given) ** 2 / weight) for name, f in squares.items()}
    bad = [name for name, f in found.items() if not torch.isfinite(f).all()]
    if bad:
        raise Diverged(f"The Fisher information of the retained rows is not finite: {', '.join(bad[:3])}.")
    return found


def _to_nll(given: Given) -> float:
    """The factor that makes a row's summed loss a negative log-likelihood; of several classes the loss is the mean."""
    head = given.objective.card.head
    config: Any = causal_lm(given.policy.model).config
    return float(config.num_labels) if head == "multilabel" else TO_NLL[head]


@torch.no_grad()
def with_drawn_labels(policy: Policy, batch: Batch, head: str, seed: int) -> Batch:
    """The batch with labels that the model itself draws: the next token after each true prefix, a class, or a value."""
    generator = torch.Generator(policy.device).manual_seed(seed)
    if head == "lm":
        return replace(batch, targets_T=policy.sample(batch, generator))
    scores_SL = policy.scores(batch)
    if head == "multilabel":
        drawn_SL = torch.bernoulli(scores_SL.sigmoid(), generator=generator)
        return replace(batch, per_segment={**batch.per_segment, "labels": drawn_SL})
    if head == "classify":
        label_S = torch.multinomial(scores_SL.softmax(-1), 1, generator=generator)[:, 0].float()
    else:
        label_S = scores_SL[:, 0] + torch.randn(len(scores_SL), generator=generator, device=scores_SL.device)
    return replace(batch, per_segment={**batch.per_segment, "label": label_S})


def _save(tensors: dict[str, Tensor], folder: Path) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / FILE)
