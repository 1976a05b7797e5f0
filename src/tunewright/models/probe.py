"""Before a model is trained it must show, on a dozen tokens, that packing is safe with it.

Whether an architecture passes our keywords on to its attention, keeps state between tokens in another way, or does
something to its logits, is not declared anywhere that could be trusted; so three equalities are checked instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunewright.core.errors import UserError
from tunewright.core.example import Example, Group
from tunewright.models.policy import Policy, head_of
from tunewright.ops.packing import collate

_LONG, _SHORT = 7, 5
TOLERANCE = {torch.float32: 1e-3}  # relative error of a vector's norm; rounding in half precision is far above 1e-3
_LOOSE = 0.1


@torch.no_grad()
def check_packable(model: nn.Module) -> None:
    """Raise UserError unless, for two short rows: packed = alone, the past does not see the future, head = logits."""
    a, b = _rows(model)
    policy = Policy(model)
    try:
        packed = policy.hidden(collate([a, b]))
        alone = policy.hidden(collate([b]))
        changed = policy.hidden(collate([_with_last_token(b, a.examples[0].ids[0])]))
        logits = _own_logits(model, b)
    except (TypeError, ValueError, AttributeError, RuntimeError) as e:
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise _refused(model, f"its forward does not take packed rows ({first})") from e
    tolerance = TOLERANCE.get(alone.dtype, _LOOSE)
    if _error(packed[_LONG:], alone) > tolerance:
        raise _refused(model, "a row's result depends on the row packed before it")
    if _error(changed[:-1], alone[:-1]) > tolerance:
        raise _refused(model, "a token's result depends on tokens that come after it")
    if _error(head_of(model).logits(alone), logits.float()) > tolerance:
        raise _refused(model, "its logits are not a plain linear head over the last hidden state")


def _rows(model: nn.Module) -> tuple[Group, Group]:
    vocab = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator,union-attr]
    ids = [(i * 7919 + 11) % vocab for i in range(_LONG + _SHORT)]
    return _group(ids[:_LONG]), _group(ids[_LONG:])


def _group(ids: list[int]) -> Group:
    return Group((Example(tuple(ids), (1.0,) * len(ids)),))


def _with_last_token(group: Group, token: int) -> Group:
    return _group([*group.examples[0].ids[:-1], token])


def _own_logits(model: nn.Module, group: Group) -> Tensor:
    """[T, V] from the model's own forward."""
    batch = collate([group])
    out: Any = model(input_ids=batch.tokens_T[None], position_ids=batch.position_T[None], use_cache=False)
    return out.logits[0]


def _error(got: Tensor, want: Tensor) -> float:
    """The largest relative error over rows: |got - want| / |want| in the Euclidean norm."""
    difference = (got.float() - want.float()).norm(dim=-1)
    return float((difference / want.float().norm(dim=-1).clamp_min(1e-6)).max())


def _refused(model: nn.Module, why: str) -> UserError:
    return UserError(
        f"This model cannot be trained here: {why} ({type(model).__name__}). Models that work are decoders with "
        "ordinary causal attention, such as Llama, Qwen, Mistral, SmolLM and Phi.",
        code="unsupported_model",
        param="model",
    )
