"""Soft prompts as they are served: keys and values that a sequence's cache begins with, the same for every text.

What stands in front of a text does not depend on it, in a causal model. So virtual tokens are computed once, when the
adapter is loaded, and a request pays a copy; prefix tuning has keys and values in its file already.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunewright.core.errors import CheckpointError
from tunewright.engine.attention import Chunk, StepPlan
from tunewright.engine.kv_cache import KVCache
from tunewright.tuners.adapter_files import VIRTUAL, WEIGHTS, read_config
from tunewright.tuners.files import read_tensors

Prefix = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [1, H, N, K]
EMBEDDED = ("PROMPT_TUNING", "P_TUNING")
KINDS = (*EMBEDDED, "PREFIX_TUNING")


def virtual_tokens(folder: Path) -> int:
    """N, the virtual tokens of an adapter that is a soft prompt, 0 for any other. Raises CheckpointError."""
    config = read_config(folder)
    return int(config[VIRTUAL]) if config.get("peft_type") in KINDS else 0


def load_prefix(net: Any, folder: Path, limit: int) -> Prefix:
    """The keys and values of a soft prompt over the model `net`, whose routing must name no adapter.

    limit: the model's context. Raises CheckpointError if the adapter does not fit the model.
    """
    config, said = read_config(folder), read_tensors(folder / WEIGHTS).get("prompt_embeddings")
    n, shape = int(config[VIRTUAL]), _shape(net)
    is_embedded = config["peft_type"] in EMBEDDED
    width = net.get_input_embeddings().weight.shape[1] if is_embedded else 2 * shape[0] * shape[1] * shape[2]
    if said is None or tuple(said.shape) != (n, width) or n >= limit:
        has = "no prompt_embeddings" if said is None else f"prompt_embeddings of {list(said.shape)}"
        raise CheckpointError(
            f"The adapter '{folder.name}' does not fit its base model: it has {has}, and the model needs "
            f"[{n}, {width}] and fewer than {limit} virtual tokens.",
            code="adapter_does_not_fit",
        )
    said = said.to(net.dtype)
    if is_embedded:
        return computed(net, said)
    layers, heads, size = shape
    x = said.view(n, layers, 2, heads, size).permute(1, 2, 3, 0, 4)[:, :, None].contiguous()  # [layers, 2, 1, H, N, K]
    return [(x[layer, 0], x[layer, 1]) for layer in range(layers)]


def computed(net: nn.Module, rows_ND: Tensor) -> Prefix:
    """What the model keeps of virtual tokens: its keys and values after a forward over their embeddings."""
    n = rows_ND.shape[0]
    kv = KVCache(n)
    cache = kv.open(n)
    net(
        inputs_embeds=rows_ND[None],
        position_ids=torch.arange(n)[None],
        use_cache=False,
        logits_to_keep=torch.tensor([0]),
        kv=StepPlan([], [Chunk(cache, 0, n, 0)]),
    )
    cache.length = n
    return kv.get(cache)


def _shape(net: Any) -> tuple[int, int, int]:
    """(layers, heads of keys and values, their size)."""
    c = net.config
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    return c.num_hidden_layers, heads, getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
