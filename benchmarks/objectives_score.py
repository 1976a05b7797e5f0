"""What a model is worth by an objective's own measure, row by row: margins, losses, sampled answers, rewards, KL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import torch

from benchmarks.methods_score import open_result, row_losses
from benchmarks.objectives_rows import Rows
from benchmarks.ours import Place
from tunewright.core.example import Example, Group
from tunewright.data.render import Overlong, render_rows
from tunewright.data.tokenizer import Tokenizer
from tunewright.data.validate import read_conversations
from tunewright.engine.engine import Engine, EngineError
from tunewright.engine.request import AskedRow, GenerateRequest, RowsRequest
from tunewright.engine.rows import RowModels
from tunewright.engine.scheduler import Limits
from tunewright.models.loader import load_model, materialise
from tunewright.models.policy import Policy
from tunewright.ops import segments
from tunewright.ops.packing import collate
from tunewright.ops.runtime import choose_dtype, set_threads

TOGETHER = 8  # rows of a forward
AT_ONCE = 64  # answers that are sampled at the same time


@dataclass(frozen=True)
class Said:
    """A sampled answer. prompt, tokens: ids, with the end token if it came."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Model:
    """What is judged: a base model's folder, with a job's result over it or without. dtype: of the products."""

    base: Path
    dtype: torch.dtype
    result: Path | None = None

    def policy(self) -> Policy:
        """With the plain modules, whatever it was trained with."""
        net = load_model(self.base) if self.result is None else open_result(self.base, self.result).model
        return Policy(net, None if self.dtype == torch.float32 else self.dtype)

    def over(self, result: Path) -> Model:
        """The same with a job's result."""
        return replace(self, result=result)


def base_model(place: Place) -> Model:
    set_threads(place.threads)
    return Model(materialise(place.model, place.home), choose_dtype(place.dtype))


def rendered(model: Model, path: Path, shape: str, max_length: int, overlong: Overlong = "drop") -> list[Group]:
    """The rows of a file as groups."""
    tokenizer = Tokenizer.load(model.base, now=datetime.now())
    rows = read_conversations(path, "auto", path.name)
    return list(render_rows(rows, tokenizer, shape=shape, max_length=max_length, overlong=overlong))


@torch.no_grad()
def margins(policy: Policy, pairs: Sequence[Group]) -> list[float]:
    """[pairs] log p(preferred) - log p(other), nats."""
    found = logps(policy, pairs)
    return [a - b for a, b in zip(found[::2], found[1::2], strict=True)]


def logps(policy: Policy, groups: Sequence[Group]) -> list[float]:
    """Of each example of the groups, in order, the sum over its trained tokens."""
    found = []
    for i in range(0, len(groups), TOGETHER):
        batch = collate(groups[i : i + TOGETHER])
        logp_T = policy.token_stats(batch, want={"logp"})["logp"]
        found += segments.sums(logp_T * batch.weights_T, batch).tolist()
    return found


def losses(model: Model, groups: Sequence[Group]) -> list[float]:
    """[rows] nats a trained token."""
    return row_losses(model.policy(), groups)


def sample(place: Place, model: Model, chats: Sequence[Rows], tokens: int, n: int = 1) -> list[list[Said]]:
    """n answers to each prompt at temperature 1, the same draws for every model. Raises EngineError."""
    engine = Engine(place.home, place.dtype, place.threads, Limits(max_running=AT_ONCE, max_waiting=1 << 20))
    running, failed = [], list[str]()

    def hear(event: dict[str, object]) -> None:
        if event["type"] == "error":
            failed.append(str(event["error"]))

    who = {"base": str(model.base)} if model.result is None else {"artefact": str(model.result)}
    for number, chat in enumerate(chats):
        asked = {**who, "messages": chat, "n": n, "max_tokens": tokens, "temperature": 1.0, "seed": number}
        running.append(engine.requests[engine.add_request(GenerateRequest.model_validate(asked), hear)])
    while engine.step():
        pass
    if failed:
        raise EngineError(failed[0])
    return [
        [Said(tuple(s.tokens[: s.n_prompt]), tuple(s.tokens[s.n_prompt :]), s.text.shown) for s in r.sequences]
        for r in running
    ]


def scores(place: Place, result: Path, conversations: Sequence[Rows]) -> list[float]:
    """What a reward model says of each conversation's last answer."""
    rows = [AskedRow(messages=list(c)) for c in conversations]
    return [found["score"] for found in _judged(place, result, rows)]


def labels(place: Place, result: Path, texts: Sequence[str]) -> list[str]:
    """A classifier's label of each text."""
    return [found["label"] for found in _judged(place, result, [AskedRow(text=t) for t in texts])]


def _judged(place: Place, result: Path, rows: list[AskedRow]) -> list[dict[str, object]]:
    set_threads(place.threads)
    models = RowModels(place.home, choose_dtype(place.dtype), 1)
    return models.judge(RowsRequest(artefact=str(result), rows=rows))["results"]


@torch.no_grad()
def divergence(new: Model, start: Model, answers: Sequence[Said]) -> float:
    """Mean over answers of log p_new - log p_start, nats an answer: the KL, if `new` has sampled them."""
    weights = [(0.0,) * len(a.prompt) + (1.0,) * len(a.tokens) for a in answers]
    groups = [Group((Example((*a.prompt, *a.tokens), w),)) for a, w in zip(answers, weights, strict=True)]
    sides = [logps(policy, groups) for policy in (new.policy(), start.policy())]
    return sum(a - b for a, b in zip(*sides, strict=True)) / len(groups)
