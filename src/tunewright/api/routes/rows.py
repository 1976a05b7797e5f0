"""POST /v1/tunewright/classify and /score: what models with a head say of texts and of answers."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool

from tunewright.api.body import json_body
from tunewright.api.errors import parse
from tunewright.api.lookup import find_target
from tunewright.api.requests import Classify, Score
from tunewright.api.schemas import Judged, Judgement, Judges, RowUsage
from tunewright.api.state import Server, server_of

router = APIRouter()
Body = Annotated[Any, Depends(json_body)]


@router.post("/v1/tunewright/classify")
async def classify(request: Request, body: Body) -> Judged:
    """The classes of texts with the distribution over them, or, of a regressor, their values."""
    wanted = parse(Classify, body)
    rows = [text.model_dump() for text in wanted.input]
    return await _judged(server_of(request), wanted.model, rows, "tunewright.classification")


@router.post("/v1/tunewright/score")
async def score(request: Request, body: Body) -> Judged:
    """How good a reward model holds answers to be: of each conversation its last message."""
    wanted = parse(Score, body)
    rows = [
        {"messages": [m.model_dump(exclude_none=True, exclude={"annotations", "refusal"}) for m in messages]}
        for messages in wanted.input
    ]
    return await _judged(server_of(request), wanted.model, rows, "tunewright.score")


async def _judged(server: Server, model: str, rows: list[dict[str, Any]], kind: Judges) -> Judged:
    target = await run_in_threadpool(find_target, server, model)
    server.slots.take()
    try:
        found = await server.engine.rows({"base": target.base, "artefact": target.artefact, "rows": rows})
    finally:
        server.slots.give()
    data = [Judgement(object=kind, index=i, **result) for i, result in enumerate(found["results"])]
    n = found["prompt_tokens"]
    return Judged(model=model, data=data, usage=RowUsage(prompt_tokens=n, total_tokens=n))
