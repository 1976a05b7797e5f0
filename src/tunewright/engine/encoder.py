"""Sentence vectors by mean pooling, and the index that is searched with them: what few-shot and retrieval look up.

As sentence-transformers computes all-MiniLM-L6-v2: hidden states of the last layer, their mean over a text's tokens,
scaled to length 1 (Reimers and Gurevych 2019, arXiv 1908.10084); a text is cut at 256 tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunewright.core.errors import CheckpointError
from tunewright.core.home import Home
from tunewright.data.tokenizer import Tokenizer
from tunewright.models.loader import load_body, materialise
from tunewright.ops.padding import pad, real

LIMIT = 256
TOGETHER = 32
_KEPT = 2
VECTORS = "vectors"


class Encoder:
    """Texts to vectors. folder: of a model of transformers with its tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.load(folder)
        self.net: Any = load_body(folder)
        self.net.requires_grad_(False)
        self.limit = min(LIMIT, getattr(self.net.config, "max_position_embeddings", None) or LIMIT)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """[N, D] float32 vectors of length 1. Texts of similar length are computed together, padded."""
        rows = [_cut(*self.tokenizer.encode_row(text), self.limit) for text in texts]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        out: list[Tensor] = [torch.empty(0)] * len(rows)
        for at in range(0, len(order), TOGETHER):
            some = order[at : at + TOGETHER]
            for i, vector_D in zip(some, self._together([rows[i] for i in some]), strict=True):
                out[i] = vector_D
        return torch.stack(out)

    def _together(self, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        lengths = [len(ids) for ids, _ in rows]
        mask_BL = real(lengths, torch.device("cpu"))
        given = {"input_ids": pad(torch.tensor([t for ids, _ in rows for t in ids]), lengths)}
        if self.tokenizer.takes_types:
            given["token_type_ids"] = pad(torch.tensor([t for _, types in rows for t in types]), lengths)
        hidden_BLD = self.net(**given, attention_mask=mask_BL).last_hidden_state.float()
        mean_BD = (hidden_BLD * mask_BL[..., None]).sum(1) / mask_BL.sum(1, keepdim=True)
        return F.normalize(mean_BD, dim=-1)


class Encoders:
    """The encoders that are loaded, by model name."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._loaded: OrderedDict[str, Encoder] = OrderedDict()

    def get(self, name: str) -> Encoder:
        """Loads it if need be. Raises ModelNotFound, UserError."""
        if name not in self._loaded:
            self._loaded[name] = Encoder(materialise(name, self.home))
            if len(self._loaded) > _KEPT:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(name)
        return self._loaded[name]

    def clear(self) -> None:
        self._loaded.clear()


def write_index(path: Path, vectors_ND: Tensor, encoder: str) -> None:
    save_file({VECTORS: vectors_ND.contiguous()}, path, metadata={"encoder": encoder})


def read_index(path: Path, n: int) -> Tensor:
    """[n, D]. Raises CheckpointError if the file is damaged or has another number of vectors."""
    try:
        vectors_ND = load_file(path)[VECTORS]
    except (OSError, SafetensorError, KeyError) as e:
        raise CheckpointError(f"The index of the recipe '{path.parent.name}' cannot be read.") from e
    if vectors_ND.ndim != 2 or vectors_ND.shape[0] != n:
        raise CheckpointError(f"The index of the recipe '{path.parent.name}' does not belong to its rows.")
    return vectors_ND


def nearest(vectors_ND: Tensor, vector_D: Tensor, k: int) -> list[int]:
    """The rows with the largest cosine, largest first; of equal ones the first row."""
    return torch.sort(vectors_ND @ vector_D, descending=True, stable=True).indices[:k].tolist()


def _cut(ids: list[int], types: list[int], limit: int) -> tuple[list[int], list[int]]:
    """At most `limit` tokens, the last of them the tokenizer's own end; at least one."""
    if len(ids) <= limit:
        return ids or [0], types or [0]
    return [*ids[: limit - 1], ids[-1]], [*types[: limit - 1], types[-1]]
