"""Every error becomes OpenAI's `{"error": {"message", "type", "param", "code"}}`: ours, HTTP's, validation's, bugs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from tunewright.api.guard import response_headers
from tunewright.core.errors import DataError, TunewrightError, UserError, did_you_mean

log = logging.getLogger(__name__)


class TooLarge(UserError):
    status = 413
    code = "request_too_large"


class RateLimited(TunewrightError):
    """More work than this server takes at once. The SDK waits `retry_after` seconds and tries again by itself."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retry_after = 1


def install(app: FastAPI) -> None:
    """Register the handlers."""
    app.add_exception_handler(TunewrightError, _ours)
    app.add_exception_handler(RequestValidationError, _request_validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _bug)


def reply(error: TunewrightError) -> JSONResponse:
    """The HTTP answer to one of our errors; a DataError also lists its problems."""
    headers = {"retry-after": str(error.retry_after)} if isinstance(error, RateLimited) else {}
    problems = error.problems if isinstance(error, DataError) else []
    extra = {"problems": [asdict(p) for p in problems]} if problems else {}
    return JSONResponse({"error": {**error.to_openai(), **extra}}, error.status, headers)


async def _ours(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, TunewrightError)
    return reply(error)


async def _request_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    # the first part of a location says where the value was: query, path, body
    items = [{**item, "loc": item["loc"][1:]} for item in error.errors()]
    return reply(validation_error(items, {}))


_HTTP_TEXTS = {
    404: "Unknown request URL: {method} {path}. See /v1/tunewright/describe and the documentation for what exists.",
    405: "Not allowed to {method} on {path}.",
}


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    text = _HTTP_TEXTS.get(error.status_code, str(error.detail))
    message = text.format(method=request.method, path=request.url.path) if error.status_code in _HTTP_TEXTS else text
    code = {404: "unknown_url", 405: "method_not_supported"}.get(error.status_code)
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return JSONResponse(body, error.status_code, error.headers)


async def _bug(request: Request, error: Exception) -> JSONResponse:
    """An error nobody foresaw. The log has the details; the client gets only the id to look for."""
    request_id = request.scope.get("request_id", "")
    log.error("%s: %s %s failed; the error follows", request_id, request.method, request.url.path)
    message = f"The server had an error of its own while answering. Its log says more under {request_id}."
    body = {"error": {"message": message, "type": "server_error", "param": None, "code": "internal_error"}}
    answer = JSONResponse(body, 500, {"connection": "close"})  # the web server closes it after such an error
    # this handler runs outside of Envelope
    answer.raw_headers.extend(response_headers(request.scope))
    return answer


# --- validation ------------------------------------------------------------------------------------------------------

_KINDS = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a decimal",
    list: "an array",
    dict: "an object",
}
_EXPECTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "a boolean",
    "bool_parsing": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
# pydantic's error type -> (OpenAI's code, what is wrong, the name of the limit in pydantic's context, the words)
_LIMITS = {
    "greater_than_equal": ("below_min_value", "below minimum value", "ge", "a value >= {}"),
    "greater_than": ("below_min_value", "below minimum value", "gt", "a value > {}"),
    "less_than_equal": ("above_max_value", "above maximum value", "le", "a value <= {}"),
    "less_than": ("above_max_value", "above maximum value", "lt", "a value < {}"),
    "string_too_long": ("above_max_length", "too long", "max_length", "a string with maximum length {}"),
    "string_too_short": ("below_min_length", "too short", "min_length", "a string with minimum length {}"),
    "too_long": ("above_max_length", "too long", "max_length", "at most {} entries"),
    "too_short": ("below_min_length", "too short", "min_length", "at least {} entries"),
}


def kind_of(value: Any) -> str:
    """`a string`, `an integer` … as OpenAI's messages name JSON types."""
    return "null" if value is None else _KINDS.get(type(value), "something else")


Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], raw: Any) -> Model:
    """`raw` as `model`, or one UserError that lists everything wrong in OpenAI's words, with the nearest names."""
    if not isinstance(raw, dict):
        raise UserError(f"The request body is {kind_of(raw)}; it must be a JSON object.", code="invalid_type")
    try:
        return model.model_validate(raw)
    except ValidationError as e:
        raise validation_error(e.errors(include_url=False), known_fields(model)) from e


def known_fields(model: type[BaseModel], prefix: str = "") -> dict[str, list[str]]:
    """Field path of every object in the request -> the names it may have."""
    names = list(model.model_fields)
    found = {prefix.rstrip("."): names}
    for name, info in model.model_fields.items():
        for part in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                found |= known_fields(part, f"{prefix}{name}.")
    return found


def validation_error(items: Iterable[Any], known: Mapping[str, list[str]]) -> UserError:
    """pydantic's list of errors as one UserError; param and code are those of the first."""
    found = list(dict.fromkeys(_describe(item, known) for item in items))
    param, code, _ = found[0]
    return UserError(" ".join(text for _, _, text in found), param=param or None, code=code)


def _describe(item: Any, known: Mapping[str, list[str]]) -> tuple[str, str, str]:
    """(param, code, message) of one pydantic error."""
    param, kind, value, limits = path_of(item["loc"]), item["type"], item.get("input"), item.get("ctx", {})
    if kind == "extra_forbidden":
        parent, _, key = param.rpartition(".")
        text = f"Unrecognized request argument supplied: {param}.{did_you_mean(key, known.get(parent, []))}"
        return param, "unknown_parameter", text
    if kind == "missing":
        return param, "missing_required_parameter", f"Missing required parameter: '{param}'."
    if kind in _EXPECTED:
        text = f"Invalid type for '{param}': expected {_EXPECTED[kind]}, but got {kind_of(value)} instead."
        return param, "invalid_type", text
    if kind in _LIMITS:
        return (param, *_describe_limit(param, kind, value, limits))
    if kind == "literal_error":
        text = f"Invalid value: '{str(value)[:80]}' for '{param}'. Supported values are: {limits['expected']}."
        return param, "invalid_value", text
    text = item["msg"].removeprefix("Value error, ")
    return param, limits.get("code", "invalid_value"), f"Invalid '{param}': {text}." if param else f"{text}."


def _describe_limit(param: str, kind: str, value: Any, limits: Mapping[str, Any]) -> tuple[str, str]:
    code, wrong, name, words = _LIMITS[kind]
    noun = {str: "string", int: "integer", float: "decimal", list: "array", dict: "object"}.get(type(value), "value")
    got = f"length {len(value)}" if hasattr(value, "__len__") else value
    text = f"Invalid '{param}': {noun} {wrong}. Expected {words.format(limits[name])}, but got {got} instead."
    return f"{noun}_{code}", text


def path_of(loc: Iterable[Any]) -> str:
    """('messages', 0, 'role') -> `messages[0].role`."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
