"""POST /v1/chat/completions: answers of base models, tuned models, checkpoints and recipes, whole or streamed."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse

from tunewright.api import completions, sampling
from tunewright.api.body import json_body
from tunewright.api.completions import Answer
from tunewright.api.errors import parse
from tunewright.api.generation import Event, Generation
from tunewright.api.lookup import find_target
from tunewright.api.requests import CreateCompletion
from tunewright.api.state import Server, server_of

router = APIRouter()

# how long the first event may take before the headers of a stream are sent anyway; errors before that have a status
FIRST_EVENT_SECONDS = 20.0
STREAM_HEADERS = {"x-accel-buffering": "no"}


@router.post("/v1/chat/completions")
async def create_completion(request: Request, body: Annotated[Any, Depends(json_body)]) -> Response:
    wanted = parse(CreateCompletion, body)
    sampling.check_stream_options(wanted)
    server = server_of(request)
    payload = await run_in_threadpool(engine_payload, server, wanted)
    generation = Generation(server.engine.generate(payload), server.slots)
    answer = Answer(
        model=wanted.model,
        metadata=wanted.metadata,
        with_logprobs=bool(wanted.logprobs),
        include_usage=bool(wanted.stream_options and wanted.stream_options.include_usage),
    )
    if wanted.stream:
        return await _streamed(answer, generation)
    return await _whole(request, answer, generation)


def engine_payload(server: Server, wanted: CreateCompletion) -> dict[str, Any]:
    """What the engine is asked."""
    target = find_target(server, wanted.model)
    tools = None if wanted.tool_choice == "none" else wanted.tools
    return {
        "base": target.base,
        "artefact": target.artefact,
        "messages": sampling.messages(wanted),
        "tools": [t.model_dump(exclude_none=True) for t in tools] if tools else None,
        **sampling.sampling(wanted),
    }


async def _streamed(answer: Answer, generation: Generation) -> Response:
    first: Event | None = None
    try:
        with suppress(TimeoutError):
            first = await generation.next(FIRST_EVENT_SECONDS)
    except BaseException:
        await generation.stop()
        raise
    lines = completions.stream(answer, generation, first)
    return StreamingResponse(lines, media_type="text/event-stream", headers=STREAM_HEADERS)


async def _whole(request: Request, answer: Answer, generation: Generation) -> Response:
    """The completion, unless the client goes away first: then the engine stops too."""
    work = asyncio.create_task(completions.whole(answer, generation))
    gone = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=499)
        return JSONResponse(completions.dump(await work))
    finally:
        work.cancel()
        gone.cancel()
        await generation.stop()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
