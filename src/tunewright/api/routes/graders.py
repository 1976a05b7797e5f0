"""/v1/fine_tuning/alpha/graders: try a grader on one answer, or only check it."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool

from tunewright.api import completions
from tunewright.api.body import json_body
from tunewright.api.errors import parse
from tunewright.api.generation import Generation
from tunewright.api.lookup import find_target
from tunewright.api.requests import CreateCompletion, RunGrader, ValidateGrader
from tunewright.api.routes.chat_completions import engine_payload
from tunewright.api.schemas import CheckedGrader, GraderExtra, GraderMetadata, GraderRun
from tunewright.api.state import Server, server_of
from tunewright.core.errors import EndpointDown
from tunewright.graders.base import ERRORS, Ask, Grade, Grader, Said, Sample, Seams, failed, nobody, parse_grader
from tunewright.graders.judging import models_here

router = APIRouter()
PATH = "/v1/fine_tuning/alpha/graders"
Body = Annotated[Any, Depends(json_body)]
BACK_OFF = (0.5, 1.0)  # whoever waits for the answer can ask again


@router.post(f"{PATH}/run")
async def run_grader(request: Request, body: Body) -> GraderRun:
    """What it gives one answer. Whatever goes wrong while grading is in `metadata.errors`, as on OpenAI's side."""
    server, wanted = server_of(request), parse(RunGrader, body)
    ask = _engine(server, asyncio.get_running_loop())
    server.grading.take()
    try:
        return await run_in_threadpool(_run, server, wanted, ask)
    finally:
        server.grading.give()


@router.post(f"{PATH}/validate")
def validate_grader(request: Request, body: Body) -> CheckedGrader:
    """The grader with what was filled in."""
    server, wanted = server_of(request), parse(ValidateGrader, body)
    with _parsed(server, wanted.grader, nobody) as grader:
        return CheckedGrader(grader=grader.spec)


def _run(server: Server, wanted: RunGrader, ask: Ask) -> GraderRun:
    with _parsed(server, wanted.grader, ask) as grader:
        try:
            grade = grader.grade(wanted.item or {}, Sample(wanted.model_sample))
        except EndpointDown as e:
            details = e.message
            grade = failed(details, model_grader_server_error=True, model_grader_server_error_details=details)
        return _shown(grader, grade)


def _parsed(server: Server, spec: dict[str, Any], ask: Ask) -> Grader:
    """Raises SpecError; ModelNotFound for a judge that is none of our models."""
    grader = parse_grader(spec, seams=Seams(ask=ask, back_off=BACK_OFF))
    for name in models_here(grader.spec):
        find_target(server, name)
    return grader


def _engine(server: Server, loop: asyncio.AbstractEventLoop) -> Ask:
    """A judge that is a model of this server. To be called from a thread, while `loop` runs in another."""

    def ask(messages: list[dict[str, Any]], **sent: Any) -> Said:
        body = {"temperature": 0, **sent, "messages": messages}
        return asyncio.run_coroutine_threadsafe(_answer(server, parse(CreateCompletion, body)), loop).result()

    return ask


async def _answer(server: Server, wanted: CreateCompletion) -> Said:
    payload = await run_in_threadpool(engine_payload, server, wanted)
    generation = Generation(server.engine.generate(payload), server.slots)
    try:
        found = await completions.whole(completions.Answer(model=wanted.model), generation)
    finally:
        await generation.stop()
    return Said(found.choices[0].message.content or "", found.usage.model_dump())


def _shown(grader: Grader, grade: Grade) -> GraderRun:
    return GraderRun(
        reward=grade.reward,
        metadata=GraderMetadata(
            name=grader.name,
            type=grader.type,
            errors={**ERRORS, **grade.errors},
            execution_time=grade.seconds,
            scores=grade.scores,
            token_usage=sum(u.get("total_tokens", 0) for u in grade.usage.values()) if grade.usage else None,
            sampled_model_name=next(iter(grade.usage), None),
        ),
        sub_rewards=grade.sub_rewards,
        model_grader_token_usage_per_model=grade.usage,
        tunewright=GraderExtra(why=grade.why),
    )
