"""What a request may hold. Unknown keys are refused; types are strict, as on OpenAI's side."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from tunewright.api.errors import kind_of


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _refuse(text: str, code: str = "invalid_value") -> PydanticCustomError:
    return PydanticCustomError("value", "{text}", {"text": text, "code": code})


def _auto_number(integer: bool, low: float, high: float | None, above: bool = False) -> BeforeValidator:
    """A check for "auto" or a number. above: `low` itself is not allowed."""
    words = "an integer" if integer else "a number"

    def check(value: Any) -> Any:
        if value is None or value == "auto":
            return "auto"
        if isinstance(value, bool) or not isinstance(value, int if integer else int | float):
            text = f"expected 'auto' or {words}, but got {kind_of(value)} instead"
            raise _refuse(text, "invalid_type")
        noun = "integer" if integer else "decimal"
        if value < low or (above and value == low):
            text = f"{noun} below minimum value. Expected a value {'>' if above else '>='} {low}, but got {value}"
            raise _refuse(text, f"{noun}_below_min_value")
        if high is not None and value > high:
            text = f"{noun} above maximum value. Expected a value <= {high}, but got {value}"
            raise _refuse(text, f"{noun}_above_max_value")
        return value

    return BeforeValidator(check)


Epochs = Annotated[int | str, _auto_number(True, 1, 50)]
BatchSize = Annotated[int | str, _auto_number(True, 1, 256)]
Multiplier = Annotated[int | float | str, _auto_number(False, 0, None, above=True)]
Beta = Annotated[int | float | str, _auto_number(False, 0, 2, above=True)]
ComputeMultiplier = Annotated[int | float | str, _auto_number(False, 0.00001, 10, above=True)]
Count = Annotated[int | str, _auto_number(True, 1, None)]


def _check_metadata(value: dict[str, str]) -> dict[str, str]:
    if len(value) > 16:
        text = f"too many pairs. Expected at most 16, but got {len(value)}"
        raise _refuse(text, "object_above_max_properties")
    for key, item in value.items():
        for what, word, limit in (("key", key, 64), ("value", item, 512)):
            if len(word) > limit:
                text = f"{what} '{word[:40]}…' has {len(word)} characters; a {what} may have {limit}"
                raise _refuse(text, "string_above_max_length")
    return value


Metadata = Annotated[dict[str, str], AfterValidator(_check_metadata)]


# --- fine-tuning -----------------------------------------------------------------------------------------------------


class Hyper(Strict):
    batch_size: BatchSize = "auto"
    learning_rate_multiplier: Multiplier = "auto"
    n_epochs: Epochs = "auto"


class DpoHyper(Hyper):
    beta: Beta = "auto"


class ReinforcementHyper(Hyper):
    compute_multiplier: ComputeMultiplier = "auto"
    eval_interval: Count = "auto"
    eval_samples: Count = "auto"
    reasoning_effort: Literal["default", "low", "medium", "high"] = "default"


class Supervised(Strict):
    hyperparameters: Hyper = Field(default_factory=Hyper)


class Dpo(Strict):
    hyperparameters: DpoHyper = Field(default_factory=DpoHyper)


class Reinforcement(Strict):
    grader: dict[str, Any]
    hyperparameters: ReinforcementHyper = Field(default_factory=ReinforcementHyper)
    response_format: dict[str, Any] | None = None


class Method(Strict):
    """Only the block named by `type` is used."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: Reinforcement | None = None


class Wandb(Strict):
    project: str
    name: str | None = None
    entity: str | None = None
    tags: list[Annotated[str, Field(max_length=64)]] = Field(default_factory=list, max_length=50)


class Integration(Strict):
    type: Literal["wandb"]
    wandb: Wandb


class CreateJob(Strict):
    """`tunewright` holds fields of our own job spec; see /v1/tunewright/describe."""

    model: str = Field(min_length=1)
    training_file: str = Field(min_length=1)
    validation_file: str | None = None
    hyperparameters: Hyper | None = None
    method: Method | None = None
    suffix: str | None = Field(None, min_length=1, max_length=64)
    seed: int | None = Field(None, ge=0, le=2_147_483_647)
    integrations: list[Integration] | None = Field(None, max_length=5)
    metadata: Metadata | None = None
    tunewright: dict[str, Any] | None = None


# --- graders ---------------------------------------------------------------------------------------------------------


class ValidateGrader(Strict):
    """grader: OpenAI's object, checked further in graders/base.py."""

    grader: dict[str, Any]


class RunGrader(ValidateGrader):
    model_sample: str
    item: dict[str, Any] | None = None


# --- recipes ---------------------------------------------------------------------------------------------------------


class CreateRecipe(Strict):
    """The fields of core/recipe.py's spec, where they are checked further. data: ids of uploaded files."""

    recipe: str | dict[str, Any]
    model: str = Field(min_length=1)
    data: list[str] = Field(default_factory=list, max_length=1000)
    suffix: str | None = Field(None, min_length=1, max_length=64)
    decoding: dict[str, Any] = Field(default_factory=dict)


# --- files -----------------------------------------------------------------------------------------------------------

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")


class CreateFile(BaseModel):
    """The form fields of an upload, apart from the file. Form values are texts, so types are not strict here."""

    model_config = ConfigDict(extra="forbid")
    purpose: Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
    anchor: Literal["created_at"] | None = Field(None, alias="expires_after[anchor]")
    seconds: int | None = Field(None, alias="expires_after[seconds]", ge=3600, le=2_592_000)


class CheckFile(Strict):
    format: str = "auto"
    min_examples: int = Field(10, ge=1)


class CreateSession(Strict):
    token: str = Field(min_length=1, max_length=200)


class CreateKey(Strict):
    name: str = Field(min_length=1, max_length=64)


# --- chat ------------------------------------------------------------------------------------------------------------


class Function(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class CalledFunction(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"]
    function: CalledFunction


def _text_of(value: Any) -> Any:
    """A message's content as one text. Images, audio and files are not understood by the models here."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _refuse(f"expected a string or an array of text parts, but got {kind_of(value)} instead", "invalid_type")
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            text = f"part {number} has type '{kind}'. The models of this server read text only: use "
            raise _refuse(text + '{"type": "text", "text": "…"}')
    return "\n".join(part["text"] for part in value)


def _stops(value: Any) -> Any:
    """`stop` as a list of 1 to 4 texts, or None."""
    if value is None:
        return None
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(w, str) and w for w in words):
        raise _refuse("expected a string or an array of non-empty strings", "invalid_type")
    if not 1 <= len(words) <= 4:
        raise _refuse(f"expected 1 to 4 strings, but got {len(words)}", "invalid_value")
    return words


Content = Annotated[str | None, BeforeValidator(_text_of)]
Stops = Annotated[list[str] | None, BeforeValidator(_stops)]


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # the SDK's own message objects carry these; they mean nothing to a model
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


Conversation = Annotated[list[ChatMessage], Field(min_length=1)]


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatExtras(Strict):
    """Sampling that OpenAI has no field for; also accepted at the top level, as other servers have it."""

    top_k: int | None = Field(None, ge=0)


class CreateCompletion(Strict):
    """Fields after `tunewright` are known to OpenAI's API and handled in sampling.py: accepted, or refused by name."""

    model: str = Field(min_length=1)
    messages: list[ChatMessage] = Field(min_length=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: Stops = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    metadata: Metadata | None = None
    tunewright: ChatExtras | None = None

    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Any = None
    prediction: Any = None
    store: bool | None = None
    service_tier: str | None = None
    modalities: list[str] | None = None
    response_format: Any = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    audio: Any = None
    web_search_options: Any = None
    moderation: Any = None
    functions: Any = None
    function_call: Any = None


# --- models with a head ----------------------------------------------------------------------------------------------


class TextRow(Strict):
    text: str
    text_pair: str | None = None


def _texts(value: Any) -> Any:
    """`input` as a list of rows: a text, an object with `text` and `text_pair`, or an array of either."""
    items = value if isinstance(value, list) else [value]
    return [{"text": item} if isinstance(item, str) else item for item in items]


def _conversations(value: Any) -> Any:
    """`input` as a list of conversations; one alone is an array of messages."""
    return [value] if isinstance(value, list) and value and isinstance(value[0], dict) else value


class Classify(Strict):
    model: str = Field(min_length=1)
    input: Annotated[list[TextRow], BeforeValidator(_texts)] = Field(min_length=1, max_length=2048)


class Score(Strict):
    model: str = Field(min_length=1)
    input: Annotated[list[Conversation], BeforeValidator(_conversations)] = Field(min_length=1, max_length=2048)
