"""Heads: what says something of a whole row, a class or a value, instead of the next token.

transformers' *ForSequenceClassification models, so the result opens there: an encoder's first token, a decoder's last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tunewright.core.errors import UserError
from tunewright.models.layouts import PACKED, causal_lm, noise_keys, segments_of
from tunewright.ops.noise import set_keys
from tunewright.ops.padding import pad, real
from tunewright.ops.types import Batch

PROBLEMS = {
    "classify": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regress": "regression",
    "reward": "regression",
}
CLASSES = ("classify", "multilabel")  # heads whose outputs are classes


@dataclass(frozen=True)
class Score:
    """How a model goes from hidden states to scores. rows: [S] the token of each segment that says all of it.
    of: (model, [S, D] their hidden states) -> [S, labels]."""

    rows: Callable[[Batch], Tensor]
    of: Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Head:
    """A head as a job asks for it.

    name: a key of PROBLEMS. labels: the names of its outputs, in order (one for `regress` and `reward`).
    seed: draws the weights of a head that the model does not have yet.
    """

    name: str
    labels: tuple[str, ...]
    seed: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """The fields of transformers' config that describe it."""
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: i for i, label in enumerate(self.labels)},
            "problem_type": PROBLEMS[self.name],
        }


def auto_class(head: Head | None, config: Any) -> Any:
    """transformers' class that opens a model of this config with this head (None: the LM head)."""
    if head is not None:
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM


def head_names(model: nn.Module) -> set[str]:
    """Names of the modules above the model's body, and of its pooler: what a new head has to learn from nothing."""
    lm: Any = causal_lm(model)
    body = getattr(lm, lm.base_model_prefix)
    names = {name for name, _ in lm.named_children() if name != lm.base_model_prefix}
    return names | ({f"{lm.base_model_prefix}.pooler"} if getattr(body, "pooler", None) is not None else set())


def scores(
    model: nn.Module,
    batch: Batch,
    layout: str,
    hidden: Callable[[Batch, Tensor], Tensor],
    embedding_noise: bool = False,
) -> Tensor:
    """[S, labels]: what the head says of each segment. hidden: the policy's, which adds the embedding noise if any.

    Raises UserError where the noise was asked for and the model's own forward, which has none, must be used.
    """
    lm: Any = causal_lm(model)
    score = _score_of(lm)
    if score is not None and (layout == PACKED or score is LAST_TOKEN):
        return score.of(lm, hidden(batch, score.rows(batch)))
    if embedding_noise:
        raise UserError(
            f"neftune_alpha cannot be used with {type(lm).__name__}: it reads its tokens itself. Set it to 0.",
            param="neftune_alpha",
        )
    return _own_forward(lm, batch)


def _score_of(lm: Any) -> Score | None:
    """How the model goes from hidden states to scores, by the modules that it has; models/probe.py proves it."""
    if hasattr(lm, "score"):
        return LAST_TOKEN
    if not hasattr(lm, "classifier"):
        return None
    pooler = getattr(getattr(lm, lm.base_model_prefix), "pooler", None)
    return FIRST_TOKEN if pooler is None else POOLED


def _first(batch: Batch) -> Tensor:
    return batch.cu_seqlens[:-1].long()


def _pooled(lm: Any, first_SD: Tensor) -> Tensor:
    return lm.classifier(getattr(lm, lm.base_model_prefix).pooler(first_SD[:, None]))


LAST_TOKEN = Score(lambda batch: batch.last_S, lambda lm, last_SD: lm.score(last_SD))  # decoders
POOLED = Score(_first, _pooled)  # BERT and its kin: a dense layer over the first token, then the classifier
FIRST_TOKEN = Score(_first, lambda lm, first_SD: lm.classifier(first_SD[:, None]))  # RoBERTa, ELECTRA: it looks itself


def _own_forward(lm: Any, batch: Batch) -> Tensor:
    """The model's own forward over padded rows."""
    out, order = [], []
    for rows, at_N, lengths in segments_of(batch):
        types = {} if batch.types_T is None else {"token_type_ids": pad(batch.types_T[at_N], lengths)}
        given = {"input_ids": pad(batch.tokens_T[at_N], lengths), "attention_mask": real(lengths, at_N.device)}
        set_keys(lm, *noise_keys(batch, rows, at_N, lengths))
        out.append(lm(**given, **types).logits)
        order += rows
    return torch.cat(out)[torch.tensor(order, device=batch.tokens_T.device).argsort()]
