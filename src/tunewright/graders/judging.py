"""What the two graders that ask a model share: the request from templates, and reading a JSON object out of an answer.

A judge with an endpoint is asked for structured output; any other one is told in words what to answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tunewright.core import asking
from tunewright.core.errors import EndpointDown, SpecError, UserError
from tunewright.core.outbound import find_endpoint
from tunewright.graders.base import Ask, Grade, GraderOptions, Said, Seams, Text, failed
from tunewright.graders.templates import Scope, Template, parse_template

MOST_TOKENS = 512  # of an answer of a judge without an endpoint, if the grader does not say
OUT_OF_REACH = {401, 402, 403, 404}  # no sample would be graded: a key, an account or a model's name
STEPS = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"description": {"type": "string"}, "conclusion": {"type": "string"}},
        "required": ["description", "conclusion"],
        "additionalProperties": False,
    },
}
IN_WORDS = (
    'Answer with one JSON object and nothing else: {{"steps": [{{"description": "…", "conclusion": "…"}}], '
    '"result": {result}}}'
)
_FENCE = re.compile(r"^\s*```\w*\s*\n(.*?)\n?\s*```\s*$", re.DOTALL)


def _text_of(value: Any) -> Any:
    """Content as one text: of a text, a part, or a list of either."""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    texts = [p if isinstance(p, str) else _part(p) for p in parts]
    return "\n".join(texts)


def _part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("input_text", "output_text", "text") or not isinstance(part.get("text"), str):
        raise ValueError(
            f"a part of type '{kind}' cannot be sent to a judge here; use texts, or "
            '{"type": "input_text", "text": "…"}'
        )
    return part["text"]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[Text, BeforeValidator(_text_of)]
    type: Literal["message"] = "message"


class SamplingParams(BaseModel):
    """max_completions_tokens: OpenAI's own spelling."""

    model_config = ConfigDict(extra="forbid", strict=True)
    seed: int | None = None
    top_p: float | None = Field(default=None, ge=0, le=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    max_completions_tokens: int | None = Field(default=None, ge=1)
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class Reach(BaseModel):
    """Ours. endpoint: a base URL that this machine may call. timeout: seconds for each wait on it.
    structured: it can be made to answer by a JSON Schema."""

    model_config = ConfigDict(extra="forbid", strict=True)
    endpoint: str | None = None
    timeout: float = Field(default=180.0, gt=0, le=3600)
    structured: bool = True


class JudgeOptions(GraderOptions):
    model: str = Field(min_length=1)
    input: list[Message] = Field(min_length=1, max_length=100)
    sampling_params: SamplingParams = Field(default_factory=SamplingParams)
    tunewright: Reach = Field(default_factory=Reach)


@dataclass(frozen=True)
class Judge:
    """A model with its question. sent: further fields of each request. hint: said after the question, or ''."""

    ask: Ask
    model: str
    roles: Sequence[str]
    templates: Sequence[Template]
    sent: dict[str, Any]
    hint: str

    def __call__(self, scope: Scope, read: Callable[[str], float], reason: Callable[[str], str]) -> Grade:
        """The grade that `read` makes of the answer; it raises ValueError for one that says nothing.

        Raises Unknown, and EndpointDown when the judge stays away.
        """
        texts = [t.render(scope) for t in self.templates]
        texts[-1] += f"\n\n{self.hint}" if self.hint else ""
        messages = [{"role": role, "content": text} for role, text in zip(self.roles, texts, strict=True)]
        try:
            said = self.ask(messages, model=self.model, **self.sent)
        except UserError as e:
            if isinstance(e, asking.Refused) and e.answered in OUT_OF_REACH:
                raise EndpointDown(e.message) from e
            return failed(e.message, model_grader_server_error=True, model_grader_server_error_details=e.message)
        usage = {self.model: said.usage} if said.usage else {}
        if said.refusal:
            return failed(f"the judge refused: {said.refusal[:300]}", usage, model_grader_refusal_error=True)
        try:
            return Grade(read(said.text), usage=usage, why=reason(said.text))
        except ValueError as e:
            return failed(f"{e}: {said.text[:300]!r}", usage, model_grader_parse_error=True)


def make_judge(options: JudgeOptions, seams: Seams, result: dict[str, Any], in_words: str) -> Judge:
    """result: the JSON Schema of what is asked for. in_words: the same, for a judge that is told."""
    reach = options.tunewright
    sampling = options.sampling_params.model_dump(exclude_none=True)
    if "max_completions_tokens" in sampling:
        sampling["max_completion_tokens"] = sampling.pop("max_completions_tokens")
    if reach.endpoint is None:
        sampling.setdefault("max_completion_tokens", MOST_TOKENS)
    structured = reach.endpoint is not None and reach.structured
    sent = {**sampling, **({"response_format": _format(result)} if structured else {})}
    roles, texts = [m.role for m in options.input], [parse_template(m.content) for m in options.input]
    hint = "" if structured else IN_WORDS.format(result=in_words)
    return Judge(_reached(options, seams), options.model, roles, texts, sent, hint)


def _reached(options: JudgeOptions, seams: Seams) -> Ask:
    """Who answers. Raises SpecError for an endpoint that is not listed, or where there is nobody."""
    if options.tunewright.endpoint is not None:
        return _endpoint(options.tunewright, seams)
    if seams.ask is None:
        raise SpecError(
            f"The judge '{options.model}' has no endpoint. Name the server that has the model: "
            '"tunewright": {"endpoint": "https://…/v1"}.',
            param="tunewright.endpoint",
        )
    return seams.ask


def _endpoint(reach: Reach, seams: Seams) -> Ask:
    endpoint = find_endpoint(reach.endpoint or "")
    shared = {"timeout": reach.timeout, "back_off": seams.back_off, "post": seams.post, "param": "grader"}

    def ask(messages: list[dict[str, Any]], *, model: str, **sent: Any) -> Said:
        teacher = asking.Teacher(endpoint, model, seams.cache, options=sent, **shared)
        answer = asking.ask(teacher, messages, seams.halt)
        return Said(answer.text, answer.usage, answer.refusal)

    return ask


def _format(result: dict[str, Any]) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {"steps": STEPS, "result": result},
        "required": ["steps", "result"],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "grade", "strict": True, "schema": schema}}


def read_result(text: str) -> Any:
    """The `result` of the JSON object in an answer; the whole answer if it is another JSON value. None without one."""
    fenced = _FENCE.match(text)
    value = _json(fenced[1] if fenced else text)
    if value is None:
        starts = [m.start() for m in re.finditer(r"\{", text)][:64]
        found = (_json(text[at:], whole=False) for at in starts)
        value = next((v for v in found if isinstance(v, dict) and "result" in v), None)
    return value.get("result") if isinstance(value, dict) else value


def read_reason(text: str) -> str:
    """What the judge concluded in its last step, if it says."""
    fenced = _FENCE.match(text)
    value = _json(fenced[1] if fenced else text)
    steps = value.get("steps") if isinstance(value, dict) else None
    last = steps[-1] if isinstance(steps, list) and steps else None
    conclusion = last.get("conclusion") if isinstance(last, dict) else None
    return conclusion[:300] if isinstance(conclusion, str) else ""


def _json(text: str, whole: bool = True) -> Any:
    try:
        return json.loads(text) if whole else json.JSONDecoder().raw_decode(text)[0]
    except (ValueError, RecursionError):
        return None


def models_here(spec: Mapping[str, Any]) -> list[str]:
    """The judges of a checked spec that have no endpoint: models of whoever grades."""
    inner = [name for sub in spec.get("graders", {}).values() for name in models_here(sub)]
    reach = spec.get("tunewright", {})
    return inner + ([spec["model"]] if "model" in spec and reach.get("endpoint") is None else [])
