"""Before a model is trained it must show, on a dozen tokens, that it can be run here: packed if possible, else padded.

Whether an architecture passes our keywords on to its attention, keeps state between tokens in another way, puts a bias
into its masks or does something to its logits, is not declared anywhere that could be trusted. So our numbers are
compared with those of transformers' own forward, row by row, without packing and with its reference attention.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunewright.core.errors import UserError
from tunewright.core.example import Example, Group
from tunewright.models.layouts import PACKED, PADDED, causal_lm, decoder_of, use_attention
from tunewright.models.policy import Policy, head_of
from tunewright.ops import attention
from tunewright.ops.packing import collate

_LONG, _SHORT = 7, 5
TOLERANCE = {torch.float32: 1e-3}  # relative error of a vector's norm; rounding in half precision is far above 1e-3
_LOOSE = 0.1
# Architectures that run padded, and why; one that is not named here shows by its numbers what it can do.
ALWAYS_PADDED = {
    "bloom": "ALiBi is part of its own attention",
    "mpt": "ALiBi is part of its own attention",
}
REFERENCE = "eager"


def settle_layout(model: nn.Module, scores: bool = False) -> str:
    """Set the model's attention so that it runs right, packed if it can; returns the layout.

    scores: the model has a head for whole rows instead of an LM head.
    Raises UserError if it is wrong both ways: a token's result depends on another row or on tokens after it, or the
    results are not those of transformers.
    """
    why: dict[str, str] = {}
    for layout, name in ((PACKED, attention.register()), (PADDED, REFERENCE)):
        if layout == PACKED and _must_be_padded(model):
            continue
        use_attention(model, name)
        why[layout] = _wrong(model, name, scores)
        if not why[layout]:
            return layout
    said = "; ".join(f"{layout}: {text}" for layout, text in why.items())
    raise UserError(
        f"This model cannot be trained here ({type(model).__name__}): its numbers are not those of transformers. "
        f"Tried {said}. "
        + ("" if scores else "An encoder (BERT, MiniLM) is trained with `head: classify` or `head: regress`."),
        code="unsupported_model",
        param="model",
    )


def presume_layout(model: nn.Module) -> None:
    """Set the attention that a model without weights will most likely have; only its numbers can tell for sure."""
    use_attention(model, REFERENCE if _must_be_padded(model) else attention.register())


def _must_be_padded(model: nn.Module) -> bool:
    config: Any = causal_lm(model).config
    chunked = getattr(config, "attention_chunk_size", None)  # local attention that our implementation has not
    return bool(config.is_encoder_decoder or config.model_type in ALWAYS_PADDED or chunked)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One CPU thread within the block: over a dozen tokens, more of them would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
@torch.no_grad()
def _wrong(model: nn.Module, name: str, scores: bool) -> str:
    """What is wrong with the numbers under the attention `name`, or ''. What half precision only seems to get wrong
    (training may leave weights that grow each rounding) is asked again in float32."""
    a, b = _rows(model)
    try:
        hidden, answers = _ours(model, [a, b], scores)
        _, changed = _ours(model, [a, _with_last_token(b, a.examples[0].ids[0])], scores)
        use_attention(model, REFERENCE)
        want = [_theirs(model, g, scores) for g in (a, b)]
    except (TypeError, ValueError, AttributeError, RuntimeError, UserError) as e:
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        return f"its forward does not take the rows ({first})"
    finally:
        use_attention(model, name)
    states = [_error(ours, theirs) for ours, (theirs, _) in zip(hidden, want, strict=True) if theirs is not None]
    outputs = [_error(ours, theirs) for ours, (_, theirs) in zip(answers, want, strict=True)]
    errors = {
        "a row's hidden states are not those that it has alone": max(states, default=0.0),
        "the head's outputs are not the model's own": max(outputs) / (10 if scores else 1),
        "a token's result depends on tokens that come after it": 0.0
        if scores
        else _error(changed[1][:-1], answers[1][:-1]),
    }
    tolerance = TOLERANCE.get(hidden[0].dtype, _LOOSE)
    wrong = next((text for text, error in errors.items() if error > tolerance), "")
    return _wrong(copy.deepcopy(model).float(), name, scores) if wrong and hidden[0].dtype not in TOLERANCE else wrong


def _ours(model: nn.Module, groups: list[Group], scores: bool) -> tuple[list[Tensor], list[Tensor]]:
    """For each row its hidden states [T, D] and logits: [T, V], or [1, labels]."""
    policy, batch = Policy(model), collate(groups)
    batch = batch.to(policy.device)
    hidden_TD = policy.hidden(batch)
    hidden = list(hidden_TD.split(batch.cu_seqlens.diff().tolist()))
    if scores:
        return hidden, list(policy.scores(batch).split(1))
    return hidden, [head_of(model).logits(h) for h in hidden]


def _theirs(model: nn.Module, group: Group, scores: bool) -> tuple[Tensor | None, Tensor]:
    """(hidden states or None, logits) of one row from the model's own forward."""
    example, device = group.examples[0], next(model.parameters()).device
    given: dict[str, Tensor] = {"input_ids": torch.tensor([example.ids], device=device)}
    if example.source_ids:
        source = torch.tensor([example.source_ids], device=device)
        out: Any = model(input_ids=source, decoder_input_ids=given["input_ids"], use_cache=False)
        return None, out.logits[0]
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    hidden: list[Tensor] = []
    handle = decoder_of(model).register_forward_hook(lambda _m, _a, out: hidden.append(out.last_hidden_state[0]))
    try:
        out = model(**given)
    finally:
        handle.remove()
    if not hidden:  # its forward goes another way
        hidden.append(decoder_of(model)(**given).last_hidden_state[0])
    return hidden[0], (out.logits if scores else out.logits[0]).float()


def _rows(model: nn.Module) -> tuple[Group, Group]:
    config: Any = causal_lm(model).config
    vocab = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator,union-attr]
    special = {getattr(config, "pad_token_id", None), 0}
    usable = [i for i in ((k * 7919 + 11) % vocab for k in range(4 * (_LONG + _SHORT))) if i not in special]
    a, b = tuple(usable[:_LONG]), tuple(usable[_LONG : _LONG + _SHORT])
    sources = (b, a) if config.is_encoder_decoder else ((), ())
    return _group(a, sources[0]), _group(b, sources[1])


def _group(ids: tuple[int, ...], source_ids: tuple[int, ...]) -> Group:
    return Group((Example(ids, (1.0,) * len(ids), source_ids=source_ids),))


def _with_last_token(group: Group, token: int) -> Group:
    example = group.examples[0]
    return _group((*example.ids[:-1], token), example.source_ids)


def _error(got: Tensor, want: Tensor) -> float:
    """The largest relative error over rows: |got - want| / |want| in the Euclidean norm; infinite if not a number."""
    difference = (got.float() - want.float()).norm(dim=-1)
    worst = float((difference / want.float().norm(dim=-1).clamp_min(1e-6)).max())
    return worst if worst == worst else float("inf")
