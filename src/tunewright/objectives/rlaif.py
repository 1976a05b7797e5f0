"""RLAIF: a judge (another server, or a model of this machine) says which of two answers is better; DPO learns that."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from tunewright.objectives.base import ObjectiveCard
from tunewright.objectives.dpo import DPO


class RLAIF(DPO):
    """loss and terms of DPO, over pairs that a judge has labelled (Lee et al. 2023, arXiv 2309.00267; Bai et al. 2022,
    arXiv 2212.08073).

    Rows without two answers get them first, sampled from the model that the job starts from. The judge is asked about
    each pair twice, the places swapped; a pair that it does not judge the same both times is left out. `answers/` in
    the run folder has the labelled pairs.
    """

    class Options(DPO.Options):
        endpoint: str | None = Field(None, description="base URL of an OpenAI-compatible server, such as https://…/v1")
        model: str | None = Field(None, description="what the judge is called there")
        judge: str | None = Field(
            None, description="a model of this machine as the judge, in the place of endpoint and model"
        )
        principles: str = Field(
            "", max_length=100_000, description="what makes an answer the better one; empty: usual ones"
        )
        temperature: float = Field(1.0, gt=0, le=2, description="of the two answers that are sampled")
        max_tokens: int = Field(256, ge=1, le=1 << 20, description="of a sampled answer")
        judge_tokens: int = Field(512, ge=1, le=1 << 20, description="that the judge may write about a pair")
        budget: int = Field(
            1_000_000, ge=1, description="the judge's tokens, read and written, after which it is asked no more"
        )
        concurrency: int = Field(4, ge=1, le=64, description="pairs that it is asked about at the same time")

    card: ClassVar[ObjectiveCard] = ObjectiveCard(
        title="AI feedback (RLAIF: a judge's preferences, learned by DPO)",
        shapes=("prompt", "chat", "preference"),
        group_size=2,
        needs_reference=True,
        either=("endpoint", "judge"),
        asks="judge",
        lr_factor=0.1,
    )
