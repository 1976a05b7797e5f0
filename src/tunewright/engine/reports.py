"""What the engine's events say: of a token, and at the end of a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tunewright.data.tokenizer import Tokenizer
from tunewright.engine.sampler import logprobs
from tunewright.engine.scheduler import Sequence as Choice
from tunewright.engine.text import token_bytes

Event = dict[str, Any]


def report(tokenizer: Tokenizer, token: int, logits_V: Tensor, top: int | None) -> Event:
    """What the event of a token says besides its text. top: likeliest tokens to tell of; None: no log-probability."""
    if top is None:
        return {"token_id": token}
    own, best = logprobs(logits_V, token, top)
    return {
        "token_id": token,
        **_token_text(tokenizer, token),
        "logprob": own,
        "top_logprobs": [{**_token_text(tokenizer, t), "logprob": p} for t, p in best],
    }


def _token_text(tokenizer: Any, token: int) -> Event:
    text = tokenizer.decode([token], skip_special=False)
    return {"token": text, "bytes": token_bytes(tokenizer.token(token), text)}


def done(sequences: Sequence[Choice], n_prompt: int, notes: Event) -> Event:
    """The last event of a request. notes: what a recipe tells of how the answer was made."""
    completion = sum(s.n_generated for s in sequences)
    choices = []
    for s in sequences:
        choice: Event = {"index": s.index, "finish_reason": s.finish_reason, "text": s.text.shown}
        choices.append({**choice, "tool_calls": s.tool_calls} if s.tool_calls else choice)
    usage = {"prompt_tokens": n_prompt, "completion_tokens": completion, "total_tokens": n_prompt + completion}
    return {"type": "done", "choices": choices, "usage": usage, **({"extra": notes} if notes else {})}
