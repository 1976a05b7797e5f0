"""What the answers look like: our own models, field by field as OpenAI's, proved by the SDK's strict parsing."""

from __future__ import annotations

from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, Field, model_serializer

Row = TypeVar("Row")
Auto = Literal["auto"]
Judges = Literal["tunewright.classification", "tunewright.score"]
FinishReason = Literal["stop", "length", "tool_calls"]


class ListPage(BaseModel, Generic[Row]):
    """A page of a list. The next one is asked for with `after=<last_id>`."""

    object: Literal["list"] = "list"
    data: list[Row]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class Deleted(BaseModel):
    id: str
    object: str
    deleted: bool = True


class File(BaseModel):
    """Times are Unix seconds."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"] = "processed"
    status_details: str | None = None


class Hyperparameters(BaseModel):
    batch_size: Auto | int = "auto"
    learning_rate_multiplier: Auto | float = "auto"
    n_epochs: Auto | int = "auto"


class JobError(BaseModel):
    code: str
    message: str
    param: str | None = None


class Job(BaseModel):
    """A fine-tuning job. `status` may also be `paused`, which OpenAI documents outside of its enum.

    error is null on a healthy job. method is null when the objective is none of OpenAI's; hyperparameters is always
    an object. tunewright: our own options, with what was filled in.
    """

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: JobError | None = None
    estimated_finish: int | None = None
    fine_tuned_model: str | None = None
    finished_at: int | None = None
    hyperparameters: Hyperparameters
    integrations: list[dict[str, Any]] = Field(default_factory=list)
    metadata: dict[str, str] | None = None
    method: dict[str, Any] | None = None
    model: str
    organization_id: str
    result_files: list[str] = Field(default_factory=list)
    seed: int
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    trained_tokens: int | None = None
    training_file: str
    user_provided_suffix: str | None = None
    validation_file: str | None = None
    tunewright: dict[str, Any] = Field(default_factory=dict)


class JobEvent(BaseModel):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class JobCheckpoint(BaseModel):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: dict[str, float]
    step_number: int


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class GraderMetadata(BaseModel):
    """errors: OpenAI's names, all of them. execution_time: seconds. token_usage: all tokens that judges used."""

    name: str
    type: str
    errors: dict[str, bool | str | None]
    execution_time: float
    scores: dict[str, Any]
    token_usage: int | None
    sampled_model_name: str | None


class GraderExtra(BaseModel):
    """why: what went wrong, in words, or what a judge concluded."""

    why: str


class GraderRun(BaseModel):
    reward: float
    metadata: GraderMetadata
    sub_rewards: dict[str, float]
    model_grader_token_usage_per_model: dict[str, dict[str, int]]
    tunewright: GraderExtra


class CheckedGrader(BaseModel):
    grader: dict[str, Any]


class Recipe(BaseModel):
    """A model made without training. id: its name, for chat completions. model: the one below it. recipe: name and
    options."""

    object: Literal["tunewright.recipe"] = "tunewright.recipe"
    id: str
    created_at: int
    model: str
    recipe: dict[str, Any]
    decoding: dict[str, Any]


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob] = Field(default_factory=list)


class Logprobs(BaseModel):
    content: list[TokenLogprob] | None
    refusal: None = None


class Usage(BaseModel):
    """Tokens of the request and of all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Message(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    annotations: list[Any] = Field(default_factory=list)
    tool_calls: list[dict[str, Any]] | None = None


class Choice(BaseModel):
    index: int
    message: Message
    logprobs: Logprobs | None = None
    finish_reason: FinishReason


class Extra(BaseModel):
    """How a recipe made the answer: passages of retrieval, proposals of a mixture. Left out of all other answers."""

    contexts: list[str] | None = None
    proposals: list[dict[str, str]] | None = None


class Completion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    metadata: dict[str, str] | None = None
    tunewright: Extra | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: dict[str, Any]
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None


class Chunk(BaseModel):
    """One server-sent event of a streamed completion. usage is sent only when it was asked for, at the end;
    tunewright with the last choice, if there is anything to tell."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    tunewright: Extra | None = None


class ProblemRow(BaseModel):
    """One thing wrong in a data file: where, what, the value, what is allowed."""

    line: int
    message: str
    field: str = ""
    value: str = ""
    allowed: str = ""
    code: str


class FileReport(BaseModel):
    """What a check of a training file found. format, shape: what was recognised; reason: why.

    problems: the first 100; n_problems counts all. usable: whether a job would accept the file; message says why not.
    """

    object: Literal["tunewright.file_report"] = "tunewright.file_report"
    file_id: str
    format: str
    shape: str
    reason: str
    n_rows: int
    n_problems: int
    problems: list[ProblemRow]
    notes: list[str]
    usable: bool
    message: str


class JobReport(BaseModel):
    """Whether a create request could become a job. message, param: what is wrong with it, all at once."""

    object: Literal["tunewright.job_check"] = "tunewright.job_check"
    usable: bool
    message: str = ""
    param: str | None = None


class MetricPoints(BaseModel):
    """Points of the charts of a job, in the order of steps."""

    object: Literal["tunewright.metrics"] = "tunewright.metrics"
    job_id: str
    status: str
    data: list[dict[str, Any]]


class Session(BaseModel):
    """What a one-time sign-in token is exchanged for. The key is shown only here."""

    object: Literal["tunewright.session"] = "tunewright.session"
    key: str


class Key(BaseModel):
    """A new API key. `key` is its text, shown only once."""

    object: Literal["tunewright.key"] = "tunewright.key"
    id: str
    name: str
    key: str
    created_at: int


class BaseModelInfo(BaseModel):
    """A base model. ready: its weights are in the data folder; needs_network: they would be downloaded."""

    FACTS: ClassVar = ("title", "parameters", "context", "licence", "source", "ready", "needs_network")
    id: str
    title: str
    parameters: int | None
    context: int | None
    licence: str
    source: str
    ready: bool
    needs_network: bool


class Description(BaseModel):
    """spec: JSON Schema of a job spec. parts: kind -> name -> {schema, defaults, card, doc} of what jobs and recipes
    are made of, and versions. `missing` in a row: the package that it needs and this server has not."""

    object: Literal["tunewright.description"] = "tunewright.description"
    spec: dict[str, Any]
    parts: dict[str, Any]
    models: list[BaseModelInfo]


class EngineState(BaseModel):
    """stats: running and waiting answers, loaded models and adapters, sizes in bytes; empty while it is stopped."""

    object: Literal["tunewright.engine"] = "tunewright.engine"
    state: str
    stats: dict[str, Any]


class WhoAmI(BaseModel):
    object: Literal["tunewright.whoami"] = "tunewright.whoami"
    organization_id: str
    open_access: bool
    key: str | None
    version: str


class Health(BaseModel):
    """ready: jobs and models can be used. The engine starts with the first chat, so `stopped` is healthy.

    parts: the list of tuners, objectives … that jobs are checked against; a job made while it is `loading` waits.
    """

    status: Literal["ready", "failing"]
    database: Literal["ok", "damaged"]
    supervisor: Literal["running", "ended"]
    engine: Literal["running", "stopped", "failing"]
    parts: Literal["ready", "loading", "broken"]
    version: str


class Judgement(BaseModel):
    """What a model with a head says of one row. Of the fields below `index` it has those of its head."""

    object: Judges
    index: int
    label: str | None = None
    labels: list[str] | None = None
    distribution: dict[str, float] | None = None
    value: float | None = None
    score: float | None = None

    @model_serializer(mode="wrap")
    def _shown(self, handler: Any) -> dict[str, Any]:
        return {k: v for k, v in handler(self).items() if v is not None}


class RowUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Judged(BaseModel):
    """In the order of the input."""

    object: Literal["list"] = "list"
    model: str
    data: list[Judgement]
    usage: RowUsage
