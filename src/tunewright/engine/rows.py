"""Models with a head for whole rows, as they are served: classifiers, regressors, reward models.

One forward over some texts, no sampling. An adapter is merged into a copy of its base; of too many loaded models the
least recently used one goes. Asked in a chat, such a model says its label or its number.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunewright.core.durable import MANIFEST, check_folder
from tunewright.core.errors import UserError
from tunewright.core.example import Example, Group
from tunewright.core.home import Home
from tunewright.core.ids import parse_model_name
from tunewright.core.run import ARTEFACT, Artefact, base_of, find_artefact, read_artefact
from tunewright.data.sides import framed, reads_frames
from tunewright.data.tokenizer import Tokenizer
from tunewright.engine.request import AskedRow, GenerateRequest, RowsRequest
from tunewright.engine.soft import virtual_tokens
from tunewright.models.heads import Head
from tunewright.models.loader import context_length, load_model, materialise
from tunewright.models.policy import Policy
from tunewright.ops.packing import pack
from tunewright.tuners.bottleneck import insert_saved, is_bottleneck
from tunewright.tuners.delta import merge_delta

TOGETHER = 2048  # tokens of one forward
Event = dict[str, Any]


@dataclass(frozen=True)
class RowModel:
    """A loaded model. limit: tokens that a row may have."""

    record: Artefact
    tokenizer: Tokenizer
    policy: Policy
    limit: int

    @property
    def labels(self) -> list[str]:
        return list(self.record.labels or ())


class RowModels:
    """Opens and scores. Belongs to the engine's thread. kept: models that stay loaded."""

    def __init__(self, home: Home, dtype: torch.dtype, kept: int) -> None:
        self.home, self.dtype, self.kept = home, dtype, kept
        self._loaded: OrderedDict[str, RowModel] = OrderedDict()

    def find(self, base: str | None, artefact: str | None) -> Path | None:
        """The folder of the model that a request names, if it has a head for rows."""
        if artefact is not None:
            folder = Path(artefact)
        elif parse_model_name(str(base)) is not None:
            folder = find_artefact(self.home, str(base))
        else:
            return None
        has_head = (folder / ARTEFACT).is_file() and read_artefact(folder).head != "lm"
        return folder if has_head else None

    def judge(self, asked: RowsRequest, first: int = 0) -> Event:
        """{"head", "labels", "results": one of result() for each row, "prompt_tokens"}. first: the first row's number.

        Raises UserError for a model without such a head, for rows that it does not read, and for too long ones.
        """
        folder = self.find(asked.base, asked.artefact)
        if folder is None:
            raise UserError(
                f"The model '{asked.base or Path(str(asked.artefact)).name}' writes text; it has no head that could "
                "judge one. Ask it with /v1/chat/completions.",
                code="unsupported_model",
                param="model",
            )
        model = self.open(folder)
        examples = [_encode(model, row, first + i) for i, row in enumerate(asked.rows)]
        scores_NL = scores(model.policy, examples)
        return {
            "head": model.record.head,
            "labels": model.labels,
            "results": [result(model.record.head, model.labels, row_L) for row_L in scores_NL],
            "prompt_tokens": sum(e.n_tokens for e in examples),
        }

    def say(self, folder: Path, asked: GenerateRequest, emit: Callable[[Event], None]) -> None:
        """Answer a chat with the label or number, as the events of an engine's request. Raises like judge()."""
        if asked.messages is None:
            raise UserError("This model reads conversations and texts; send 'messages', not 'prompt'.", param="prompt")
        if asked.tools:
            raise UserError("This model answers with a label or a number and calls no tools.", param="tools")
        model = self.open(folder)
        row = row_of_chat(asked.messages, model.record)
        example = _encode(model, row, 0)
        scores_L = scores(model.policy, [example])[0]
        found = result(model.record.head, model.labels, scores_L)
        text = text_of(found)
        told: Event = {"type": "token", "text": text, "token_id": 0}
        if asked.top_logprobs is not None and model.record.head == "classify":
            told |= _logprobs(model.labels, scores_L, asked.top_logprobs)
        emit({"type": "start", "prompt_tokens": example.n_tokens})
        for index in range(asked.n):
            emit({**told, "index": index})
        choices = [{"index": i, "finish_reason": "stop", "text": text} for i in range(asked.n)]
        usage = {"prompt_tokens": example.n_tokens, "completion_tokens": asked.n}
        emit({"type": "done", "choices": choices, "usage": {**usage, "total_tokens": sum(usage.values())}})

    def open(self, folder: Path) -> RowModel:
        """The loaded model. Raises CheckpointError, UserError for what cannot be served."""
        stat = (folder / ARTEFACT).stat()
        key = f"{folder.resolve()}@{stat.st_mtime_ns}-{stat.st_ino}"
        if key not in self._loaded:
            while len(self._loaded) >= self.kept:
                self._loaded.popitem(last=False)
            self._loaded[key] = self._load(folder)
        self._loaded.move_to_end(key)
        return self._loaded[key]

    def unload(self, folder: str | None = None) -> int:
        """Forget the models from `folder`, or all; returns how many."""
        gone = [k for k in self._loaded if folder is None or k.startswith(f"{Path(folder).resolve()}@")]
        for key in gone:
            del self._loaded[key]
        return len(gone)

    def names(self) -> list[str]:
        return [key.split("@")[0] for key in self._loaded]

    def _load(self, folder: Path) -> RowModel:
        if (folder / MANIFEST).is_file():
            check_folder(folder)
        record = read_artefact(folder)
        weights = folder if record.kind == "weights" else self._base(str(base_of(folder, record)))
        net = load_model(weights, self.dtype, Head(record.head, tuple(record.labels or ())))
        if record.kind != "weights":
            net = _put(net, folder, record)
        policy = Policy(net.requires_grad_(False).eval())
        # an adapter's folder has no config.json, which says whether the model takes token types
        return RowModel(record, Tokenizer.load(weights), policy, context_length(weights))

    def _base(self, name: str) -> Path:
        return find_artefact(self.home, name) if parse_model_name(name) else materialise(name, self.home)


@torch.inference_mode()
def scores(policy: Policy, examples: Sequence[Example]) -> Tensor:
    """[N, labels] float32 of the examples in their order; their `source` must ascend."""
    batches = pack([Group((e,)) for e in examples], TOGETHER)
    found_NL = torch.cat([policy.scores(b.to(policy.device)) for b in batches]).cpu()
    return found_NL[torch.cat([b.source_S for b in batches]).argsort()]


def result(head: str, labels: Sequence[str], scores_L: Tensor) -> Event:
    """What a row's scores say: {"label" or "labels", "distribution"}, {"value"} or {"score"}.

    distribution: the chance of each class; they add up to 1 where a row has one class.
    """
    if head in ("regress", "reward"):
        return {"value" if head == "regress" else "score": float(scores_L[0])}
    chance_L = (scores_L.softmax(-1) if head == "classify" else scores_L.sigmoid()).tolist()
    distribution = dict(zip(labels, chance_L, strict=True))
    if head == "classify":
        return {"label": labels[int(scores_L.argmax())], "distribution": distribution}
    return {"labels": [k for k, p in distribution.items() if p > 0.5], "distribution": distribution}


def text_of(found: Event) -> str:
    """A result as the answer of a chat: the label, several with commas between, or the number."""
    if "label" in found:
        return found["label"]
    if "labels" in found:
        return ", ".join(found["labels"])
    return f"{found.get('value', found.get('score')):.6g}"


def row_of_chat(messages: list[dict[str, Any]], record: Artefact) -> AskedRow:
    """The row that a conversation is: for a reward model itself, for others the user's message, or two as a pair."""
    if record.head == "reward":
        return AskedRow(messages=messages)
    texts = [str(m.get("content") or "") for m in messages]
    if not 1 <= len(texts) <= 2 or any(m.get("role") != "user" for m in messages):
        roles = ", ".join(str(m.get("role")) for m in messages)
        raise UserError(
            f"The model '{record.name}' judges a text (head {record.head}). Send it as one user message, or a pair of "
            f"texts as two; this conversation has the roles {roles[:200]}.",
            param="messages",
        )
    return AskedRow(text=texts[0], text_pair=texts[1] if len(texts) == 2 else None)


def _encode(model: RowModel, row: AskedRow, number: int) -> Example:
    """The row as in training. Raises UserError."""
    wants = "messages" if model.record.head == "reward" else "text"
    if getattr(row, wants) is None:
        other = "score" if wants == "messages" else "classify"
        raise UserError(
            f"The model '{model.record.name}' has the head {model.record.head} and reads '{wants}'; use "
            f"/v1/tunewright/{other}.",
            code="unsupported_model",
            param="model",
        )
    if row.messages is not None:
        ids, types = _conversation(model, row.messages)
    else:
        ids, types = model.tokenizer.encode_row(row.text or "", row.text_pair)
    if not 1 <= len(ids) <= model.limit:
        raise UserError(
            f"Row {number} has {len(ids)} tokens; this model reads 1 to {model.limit}. Shorten it.",
            code="context_length_exceeded" if ids else "invalid_value",
            param=f"input[{number}]",
        )
    kept = tuple(types) if model.tokenizer.takes_types and any(types) else ()
    return Example(tuple(ids), (0.0,) * len(ids), number, types=kept)


def _conversation(model: RowModel, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    before, answer = messages[:-1], (messages or [{}])[-1]
    if not before or answer.get("role") != "assistant":
        raise UserError(
            "A reward model scores an answer: the conversation must end with an assistant message and have one before "
            "it.",
            param="messages",
        )
    if reads_frames(model.tokenizer):
        return framed([str(m.get("content") or "") for m in before], str(answer.get("content") or ""), model.tokenizer)
    ids = model.tokenizer.encode_chat(messages, add_generation_prompt=False)
    return ids, [0] * len(ids)


def _put(net: Any, folder: Path, record: Artefact) -> Any:
    """The model with a saved adapter or delta in its weights."""
    if record.kind == "delta":
        return merge_delta(net, folder)
    if virtual_tokens(folder):
        raise UserError(
            f"The model '{record.name}' is a soft prompt with a head for rows, which is not served. Train with lora.",
            code="unsupported_model",
            param="model",
        )
    if is_bottleneck(folder):
        return insert_saved(net, folder)
    from tunewright.tuners.peft_adapter import merge_adapter  # peft's import would double the engine's start

    return merge_adapter(net, folder)


def _logprobs(labels: Sequence[str], scores_L: Tensor, top: int) -> Event:
    """The chosen class and the `top` likeliest ones, as a token's log-probabilities are told."""
    logp = scores_L.log_softmax(-1)

    def told(k: int) -> Event:
        return {"token": labels[k], "bytes": list(labels[k].encode()), "logprob": float(logp[k])}

    best = torch.sort(logp, descending=True, stable=True).indices[:top].tolist()
    return {**told(int(logp.argmax())), "top_logprobs": [told(k) for k in best]}
