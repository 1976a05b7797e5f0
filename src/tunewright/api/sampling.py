"""From a chat request to what the engine understands. Nothing is ignored in silence: what has no effect is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tunewright.api.requests import CreateCompletion
from tunewright.core.errors import UserError

# Fields that change nothing in an answer here: who asks, caching hints, bookkeeping.
HARMLESS = (
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
    "prediction",
    "metadata",
)

# field -> (is this value the same as not asking?, what the server says otherwise)
UNSUPPORTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "response_format": (
        lambda v: v == {"type": "text"},
        "this server cannot yet force an answer into a format. Leave it out and describe the format in the prompt, "
        "or fine-tune the model on answers in that format",
    ),
    "store": (lambda v: not v, "this server does not store completions yet. Leave it out"),
    "service_tier": (lambda v: v in ("auto", "default"), "there is one tier here. Use 'auto' or leave it out"),
    "modalities": (lambda v: v == ["text"], "models here answer in text. Use ['text'] or leave it out"),
    "reasoning_effort": (lambda v: v == "none", "models here have no reasoning effort. Leave it out"),
    "verbosity": (lambda v: False, "models here have no verbosity. Leave it out and ask for it in the prompt"),
    "audio": (lambda v: False, "models here answer in text. Leave it out"),
    "web_search_options": (lambda v: False, "this server does not search the web. Leave it out"),
    "moderation": (lambda v: False, "this server has no moderation yet. Leave it out"),
    "functions": (lambda v: False, "it is OpenAI's old name. Use tools"),
    "function_call": (lambda v: False, "it is OpenAI's old name. Use tools and tool_choice"),
    "tool_choice": (
        lambda v: v in ("auto", "none"),
        "this server cannot yet force a tool call. Use 'auto' or 'none'",
    ),
    "parallel_tool_calls": (lambda v: v is True, "this server cannot yet limit tool calls. Leave it out"),
}


def refuse_unsupported(request: CreateCompletion) -> None:
    """Raise one UserError that names every field whose effect this server does not have."""
    found = []
    for name, (same_as_unset, why) in UNSUPPORTED.items():
        value = getattr(request, name)
        if value is not None and not same_as_unset(value):
            found.append((name, f"'{name}' is not supported with this value: {why}."))
    if found:
        raise UserError(" ".join(text for _, text in found), param=found[0][0], code="unsupported_value")


def sampling(request: CreateCompletion) -> dict[str, Any]:
    """The sampling part of the engine's payload; where the request says nothing, the model's own defaults count."""
    refuse_unsupported(request)
    own = request.tunewright
    given = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": _agreed("top_k", request.top_k, "tunewright.top_k", own.top_k if own else None),
        "max_tokens": _agreed("max_completion_tokens", request.max_completion_tokens, "max_tokens", request.max_tokens),
        "stop": request.stop,
        "seed": request.seed,
        "n": request.n,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "logit_bias": request.logit_bias,
    }
    return {**{name: value for name, value in given.items() if value is not None}, **_logprobs(request)}


def _agreed(name: str, value: int | None, other_name: str, other: int | None) -> int | None:
    """The one value of two spellings of the same thing."""
    if value is not None and other is not None and value != other:
        raise UserError(f"'{name}' is {value} and '{other_name}' is {other}; they mean the same. Send one.", param=name)
    return value if value is not None else other


def _logprobs(request: CreateCompletion) -> dict[str, Any]:
    """How many alternatives the engine reports with each token; absent if no log-probabilities were asked for."""
    if request.top_logprobs is not None and not request.logprobs:
        raise UserError("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
    return {"logprobs": request.top_logprobs or 0} if request.logprobs else {}


def check_stream_options(request: CreateCompletion) -> None:
    if request.stream_options is not None and not request.stream:
        raise UserError("'stream_options' is only allowed when 'stream' is true.", param="stream_options")


def messages(request: CreateCompletion) -> list[dict[str, Any]]:
    """The messages as the chat template sees them: text content, no empty fields."""
    return [_message(m.model_dump(exclude_none=True), number) for number, m in enumerate(request.messages)]


def _message(message: dict[str, Any], number: int) -> dict[str, Any]:
    if message["role"] != "assistant" and "content" not in message:
        raise UserError(
            f"messages[{number}] has no content; only an assistant message with tool_calls may have none.",
            param=f"messages[{number}].content",
            code="missing_required_parameter",
        )
    for extra in ("annotations", "refusal"):
        message.pop(extra, None)
    return {"content": None, **message} if message["role"] == "assistant" else message
