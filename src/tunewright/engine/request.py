"""What one generation asks for, as it comes over the wire. Torch-free; unknown fields are refused."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tunewright.core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from tunewright.data.tokenizer import Tokenizer

DECODING = ("temperature", "top_p", "top_k", "max_tokens", "stop", "seed", "presence_penalty", "frequency_penalty")

MAX_ROWS = 2048  # rows that a request for a head may hold


class GenerateRequest(BaseModel):
    """One request: which weights, what input, how to sample. None means the artefact's default, then OpenAI's.

    base: a catalogue name or folder. artefact: the folder of a fine-tuned model; it names its own base.
    messages: a chat, rendered with the model's template; prompt: raw text or token ids. Exactly one of the two.
    max_tokens: tokens to generate, per choice; None is what the context leaves room for.
    stop: up to 4 texts that end a choice; they are not part of the answer.
    seed: makes sampling repeatable, whatever else runs. n: choices.
    logprobs: false none, true or 0 the chosen token's, k also the k likeliest tokens'.
    logit_bias: {token id: added to its logit}.
    """

    model_config = ConfigDict(extra="forbid")
    base: str | None = None
    artefact: str | None = None
    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    tools: list[dict[str, Any]] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    max_tokens: int | None = Field(None, ge=1)
    stop: list[str] | None = Field(None, max_length=4)
    seed: int | None = None
    n: int = Field(1, ge=1, le=128)
    logprobs: bool | int | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[int, float] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("n", mode="before")
    @classmethod
    def _n(cls, value: Any) -> Any:
        return 1 if value is None else value

    @model_validator(mode="after")
    def _check(self) -> GenerateRequest:
        if self.base is None and self.artefact is None:
            raise ValueError("give 'base' (a model) or 'artefact' (the folder of a fine-tuned one)")
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give either 'messages' or 'prompt'")
        if self.messages is not None and not self.messages:
            raise ValueError("'messages' is empty; it needs at least one")
        if self.stop and not all(self.stop):
            raise ValueError("'stop' holds an empty text")
        if self.logprobs is not None and not 0 <= int(self.logprobs) <= 20:
            raise ValueError(f"'logprobs' is {self.logprobs}; allowed: true, false or 0 to 20")
        if self.logit_bias and not all(-100 <= v <= 100 for v in self.logit_bias.values()):
            raise ValueError("'logit_bias' values go from -100 to 100")
        return self

    @property
    def top_logprobs(self) -> int | None:
        """How many likeliest tokens to report; None: report no log-probabilities."""
        if self.logprobs is None or self.logprobs is False:
            return None
        return 0 if self.logprobs is True else int(self.logprobs)


class AskedRow(BaseModel):
    """What a head for rows judges: a text, or two, or a conversation that ends with the answer."""

    model_config = ConfigDict(extra="forbid")
    text: str | None = None
    text_pair: str | None = None
    messages: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _check(self) -> AskedRow:
        if (self.text is None) == (self.messages is None):
            raise ValueError("a row has either 'text' or 'messages'")
        return self


class RowsRequest(BaseModel):
    """Rows for a model with a head. base, artefact: as in GenerateRequest."""

    model_config = ConfigDict(extra="forbid")
    base: str | None = None
    artefact: str | None = None
    rows: list[AskedRow] = Field(min_length=1, max_length=MAX_ROWS)

    @model_validator(mode="after")
    def _check(self) -> RowsRequest:
        if self.base is None and self.artefact is None:
            raise ValueError("give 'base' (a model) or 'artefact' (the folder of a fine-tuned one)")
        return self


Asked = TypeVar("Asked", bound=BaseModel)


def parse_request(raw: Any) -> GenerateRequest:
    """A GenerateRequest from plain data. Raises one UserError that lists everything wrong."""
    return parse_as(GenerateRequest, raw)


def parse_as(model: type[Asked], raw: Any) -> Asked:
    """The same for any such model."""
    if not isinstance(raw, dict):
        raise UserError(f"A request is an object of fields and values, not {type(raw).__name__}.")
    try:
        return model.model_validate(raw)
    except ValidationError as e:
        texts, param = [], None
        for item in e.errors():
            name = str(item["loc"][0]) if item["loc"] else ""
            param = param or name or None
            if item["type"] == "extra_forbidden":
                texts.append(f"unknown field '{name}'.{did_you_mean(name, model.model_fields)}")
            else:
                given = f" (got {item['input']!r:.60})" if name else ""
                texts.append(f"{name + ': ' if name else ''}{item['msg'].removeprefix('Value error, ')}{given}")
        raise UserError(f"The request is not valid: {'; '.join(dict.fromkeys(texts))}.", param=param) from e


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens, every value settled. temperature 0 is greedy; top_k 0 and top_p 1 keep all tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)

    @property
    def edits_logits(self) -> bool:
        return bool(self.logit_bias or self.presence_penalty or self.frequency_penalty)


@dataclass(frozen=True)
class Settled:
    """A request's decoding after defaults: what to sample, how long, where to stop."""

    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]


def settle(request: GenerateRequest, defaults: dict[str, Any]) -> Settled:
    """The request's own values, else the artefact's `defaults`, else temperature 1 over all tokens.

    Without a seed one is drawn. Raises UserError if the artefact's defaults are not valid.
    """
    own = {k: getattr(request, k) for k in DECODING if getattr(request, k) is not None}
    known = {k: v for k, v in defaults.items() if k in DECODING and v is not None}
    checked = parse_request({"base": "-", "prompt": "", **known, **own})
    return Settled(
        Sampling(
            temperature=1.0 if checked.temperature is None else checked.temperature,
            top_p=1.0 if checked.top_p is None else checked.top_p,
            top_k=checked.top_k or 0,
            seed=secrets.randbits(62) if checked.seed is None else checked.seed,
            presence_penalty=checked.presence_penalty or 0.0,
            frequency_penalty=checked.frequency_penalty or 0.0,
            logit_bias=request.logit_bias or {},
        ),
        checked.max_tokens,
        tuple(checked.stop or ()),
    )


def encode(asked: GenerateRequest, tokenizer: Tokenizer) -> list[int]:
    """The request's input as token ids: the rendered chat, or the text as it stands. Raises UserError."""
    if isinstance(asked.prompt, list):
        wrong = next((t for t in asked.prompt if not 0 <= t < tokenizer.vocab_size), None)
        if wrong is not None:
            raise UserError(
                f"'prompt' holds token {wrong}; ids go from 0 to {tokenizer.vocab_size - 1}.", param="prompt"
            )
        tokens = asked.prompt
    elif asked.prompt is not None:
        tokens, _ = tokenizer.encode(asked.prompt, add_special=True)
    else:
        tokens = tokenizer.encode_chat(asked.messages or [], asked.tools)
    if not tokens:
        raise UserError("The input has no tokens; give at least one character.", param="prompt")
    return tokens
