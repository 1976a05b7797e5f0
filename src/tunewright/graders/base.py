"""A grader: from (item, sample) to a grade. Its spec is OpenAI's; a bad sample never raises, the grade says why.

with parse_grader(spec, fields=["answer"]) as grader:
    grade = grader.grade({"answer": "cat"}, Sample("cat"))  # from any number of threads
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from tunewright.core.asking import BACK_OFF, Post
from tunewright.core.errors import SpecError, did_you_mean
from tunewright.core.outbound import post_json
from tunewright.core.spec import parse_as
from tunewright.graders import GRADERS
from tunewright.graders.templates import Scope, Template, Unknown, parse_template

# `metadata.errors` of OpenAI's answer, with what each is when nothing is wrong
ERRORS: dict[str, bool | None] = {
    "formula_parse_error": False,
    "sample_parse_error": False,
    "truncated_observation_error": False,
    "unresponsive_reward_error": False,
    "invalid_variable_error": False,
    "other_error": False,
    "python_grader_server_error": False,
    "python_grader_server_error_type": None,
    "python_grader_runtime_error": False,
    "python_grader_runtime_error_details": None,
    "model_grader_server_error": False,
    "model_grader_refusal_error": False,
    "model_grader_parse_error": False,
    "model_grader_server_error_details": None,
}
BAD_TEMPLATE = "template"  # the type of pydantic's error
Item = Mapping[str, Any]
Errors = dict[str, bool | str]
Usage = dict[str, int]


@dataclass(frozen=True)
class Sample:
    """An answer of a model. output_json: if it is not given, what `output_text` says as JSON, if it is JSON."""

    output_text: str
    output_json: Any = None
    output_tools: list[dict[str, Any]] = field(default_factory=list)
    choices: list[dict[str, Any]] = field(default_factory=list)

    def scope(self) -> dict[str, Any]:
        """What templates and python graders see as `sample`; no output_json where the answer is none."""
        message = {"role": "assistant", "content": self.output_text, "tool_calls": self.output_tools}
        found = self.output_json
        if found is None:
            with suppress(ValueError, RecursionError):
                found = json.loads(self.output_text)
        return {
            "output_text": self.output_text,
            **({} if found is None else {"output_json": found}),
            "output_tools": self.output_tools,
            "choices": self.choices or [{"index": 0, "message": message, "finish_reason": "stop"}],
        }


@dataclass(frozen=True)
class Grade:
    """How good a sample is.

    reward: a finite number; 0 when it could not be graded.
    errors: names of ERRORS that are set, with True or their details; empty when all went well.
    sub_rewards: of the graders of a `multi`. scores: what OpenAI's `metadata.scores` has.
    why: the errors in words, or what a judge concluded. seconds: of grading.
    usage: tokens that judges used, {model: {"prompt_tokens": …}}.
    """

    reward: float
    errors: Errors = field(default_factory=dict)
    sub_rewards: dict[str, float] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    why: str = ""
    usage: dict[str, Usage] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.errors


def failed(why: str, usage: dict[str, Usage] | None = None, **errors: bool | str) -> Grade:
    """The grade of a sample that could not be graded."""
    return Grade(0.0, errors, why=why, usage=usage or {})


@dataclass(frozen=True)
class Said:
    """What a judge answered. usage: tokens. refusal: what it said instead of answering."""

    text: str
    usage: Usage = field(default_factory=dict)
    refusal: str = ""


# ask(messages, model=…, **sampling) -> Said: a judge that needs no endpoint. Raises EndpointDown, UserError.
Ask = Callable[..., Said]


@dataclass(frozen=True)
class Seams:
    """What graders are given from outside.

    ask: answers for a judge model without an endpoint. cache: the folder of kept answers of endpoints; None keeps none.
    back_off: seconds before each further try of an endpoint. halt: set, it ends the waiting. post: how endpoints are
    asked.
    """

    ask: Ask | None = None
    cache: Path | None = None
    back_off: tuple[float, ...] = BACK_OFF
    halt: Event = field(default_factory=Event)
    post: Post = post_json


def nobody(messages: list[dict[str, Any]], **sent: Any) -> Said:
    """The Seams.ask of a grader that is only checked."""
    raise AssertionError("a grader that is only checked asks nobody")


class Work(Protocol):
    """One type of grader. templates: every text of it that may hold variables."""

    Options: ClassVar[type[GraderOptions]]
    templates: Sequence[Template]

    def __init__(self, options: Any, seams: Seams) -> None: ...

    def __call__(self, scope: Scope) -> Grade:
        """Grade {"item": …, "sample": …}. Raises Unknown; EndpointDown if a judge is away."""
        ...

    def close(self) -> None: ...


def _checked(text: str) -> str:
    try:
        parse_template(text)
    except ValueError as e:
        raise PydanticCustomError(BAD_TEMPLATE, "{text}", {"text": str(e)}) from e
    return text


Text = Annotated[str, AfterValidator(_checked)]


class GraderOptions(BaseModel):
    """Base of every grader's spec: unknown fields are refused, types are strict."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: str
    name: str = Field(min_length=1, max_length=256)


@dataclass
class Grader:
    """A checked grader. fields: of the row, as far as its templates name any (a python grader reads what it likes)."""

    options: GraderOptions
    work: Work

    @property
    def type(self) -> str:
        return self.options.type

    @property
    def name(self) -> str:
        return self.options.name

    @property
    def spec(self) -> dict[str, Any]:
        """The spec as OpenAI's `validate` gives it back."""
        return self.options.model_dump(mode="json", exclude_none=True)

    @property
    def fields(self) -> set[str]:
        return {name for template in self.work.templates for name in template.fields}

    def grade(self, item: Item, sample: Sample) -> Grade:
        """Grade one sample of one row. Raises only EndpointDown, when a judge stays away after several tries."""
        begun = time.perf_counter()
        grade = self.graded({"item": item, "sample": sample.scope()})
        return replace(grade, seconds=time.perf_counter() - begun)

    def graded(self, scope: Scope) -> Grade:
        """grade() of {"item": …, "sample": …}, not timed."""
        try:
            return self.work(scope)
        except Unknown as e:
            kind = "sample_parse_error" if e.path[:2] == ("sample", "output_json") else "invalid_variable_error"
            return Grade(0.0, {kind: True}, why=str(e))

    def close(self) -> None:
        """End what it keeps running."""
        self.work.close()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def parse_grader(
    spec: Any, fields: Iterable[str] | None = None, param: str = "grader", seams: Seams | None = None
) -> Grader:
    """A grader from OpenAI's object.

    fields: names that rows have (None: not known, nothing is checked). param: where the spec was, for the error.
    Raises one SpecError with everything wrong; its code is `invalid_variable_error` if a template is what is wrong.
    """
    grader = build(spec, param, seams or Seams())
    known = None if fields is None else sorted(set(fields))
    missing = sorted(grader.fields - set(known)) if known is not None else []
    if known is not None and missing:
        grader.close()
        names = "; ".join(f"{{{{ item.{name} }}}}: no row has '{name}'.{did_you_mean(name, known)}" for name in missing)
        have = f"Rows have: {', '.join(known)}." if known else "Rows have no fields beside messages."
        raise SpecError(
            f"The grader '{grader.name}' names fields that are not there: {names} {have}",
            param=param,
            code="invalid_variable_error",
        )
    return grader


def build(spec: Any, param: str, seams: Seams) -> Grader:
    """A grader by its type, without a look at the rows. Raises SpecError."""
    if not isinstance(spec, Mapping):
        raise SpecError(f"A grader is an object with type and name, not {type(spec).__name__}.", param=param)
    kind = spec.get("type")
    if not isinstance(kind, str) or kind not in GRADERS.paths():
        near = did_you_mean(kind, GRADERS) if isinstance(kind, str) else ""
        said = f"is '{kind}'" if kind is not None else "is missing"
        raise SpecError(f"The grader's type {said}. Use one of: {', '.join(GRADERS)}.{near}", param=f"{param}.type")
    work = GRADERS.load(kind)
    try:
        options = parse_as(work.Options, dict(spec), f"{kind} grader")
        return Grader(options, work(options, seams))
    except SpecError as e:
        wrong = e.__cause__.errors() if isinstance(e.__cause__, ValidationError) else []
        code = "invalid_variable_error" if any(w["type"] == BAD_TEMPLATE for w in wrong) else e.code
        raise SpecError(e.message, param=f"{param}.{e.param}" if e.param else param, code=code) from e
