"""Distillation from a local teacher: not only its likeliest token, but how likely it holds each one."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field

from tunewright.objectives import base
from tunewright.objectives.base import ObjectiveCard, TokenModel
from tunewright.objectives.pretrain import MOST
from tunewright.ops.logprob import KINDS
from tunewright.ops.types import Batch, Term


class Distill:
    """loss = sum_t w_t [(1 - h) tau^2 D(teacher_t, student_t) - h log p(y_t)] / sum_t w_t, over the whole step.

    D between the next-token distributions at temperature tau, over the whole vocabulary (Hinton et al. 2015, arXiv
    1503.02531, section 2, which has the factor tau^2): `forward` KL(teacher || student), `reverse` KL(student ||
    teacher) (Gu et al. 2024, arXiv 2306.08543), `jsd` the generalised Jensen-Shannon divergence between both (Agarwal
    et al. 2024, arXiv 2306.13649). h: `hard`, the share of the plain loss.
    Terms: `loss`; with coef 0 `accuracy`, as in SFT, `divergence`, D in nats a token, and `nll`, - log p(y_t).
    """

    class Options(base.Options):
        teacher: str | None = Field(None, description="the model to learn from: a catalogue name or an `ft:` model")
        kind: Literal["forward", "reverse", "jsd"] = Field(
            "forward", description="forward: covers all that the teacher holds likely; reverse: keeps to its main part"
        )
        beta: float = Field(0.5, gt=0, lt=1, description="of jsd: near 0 it is like forward, near 1 like reverse")
        temperature: float = Field(1.0, gt=0, le=20, description="above 1 the teacher's less likely tokens count more")
        hard: float = Field(0.0, ge=0, lt=1, description="share of the rows' own tokens in the loss")
        documents: Literal["separate", "joined"] = Field("separate", description="of plain texts, as in pretrain")

    card: ClassVar[ObjectiveCard] = ObjectiveCard(
        title="Distillation", shapes=("chat", "text"), group_size=0, required=("teacher",)
    )

    teacher: Any = None  # set when a job is put together

    def __init__(self, options: Distill.Options) -> None:
        self.options = options

    def weights(self, batch: Batch) -> dict[str, float]:
        return dict.fromkeys(("loss", "accuracy", "divergence", "nll"), float(batch.weights_T.sum()))

    def __call__(self, policy: TokenModel, batch: Batch, stats: Any = None) -> dict[str, Term]:
        o, n = self.options, self.weights(batch)["loss"]
        want = {"divergence", "logp", "correct"}
        got = policy.compare(batch, self.teacher, want, KINDS[o.kind], o.beta, o.temperature)
        far, nll, right = ((x * batch.weights_T).sum() for x in (got["divergence"], -got["logp"], got["correct"]))
        soft = (1 - o.hard) * o.temperature**2 * far
        return {
            "loss": Term(soft + o.hard * nll if o.hard else soft, n),
            "accuracy": Term(right.detach(), n, coef=0.0),
            "divergence": Term(far.detach(), n, coef=0.0),
            "nll": Term(nll.detach(), n, coef=0.0),
        }

    def report(self, means: dict[str, float]) -> dict[str, float]:
        return {"divergence": means["divergence"], "perplexity": math.exp(min(means["nll"], MOST))}
