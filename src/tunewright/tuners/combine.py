"""Several LoRA adapters of one base made into one: by peft's add_weighted_adapter; and the first ranks of a DyLoRA one.

Linear sums A and B apart, so the products mix: the roughest. cat keeps the weighted sum of the updates exactly, at the
sum of the ranks; svd is the best approximation of that sum at a rank. ties (Yadav et al. 2023, arXiv 2306.01708) trims
and elects signs; dare (Yu et al. 2023, arXiv 2311.03099) drops at random and scales up; dare_ties is both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from tunewright.core.errors import SpecError, did_you_mean
from tunewright.ops.runtime import quiet
from tunewright.tuners.adapter_files import WEIGHTS, read_config, saved_shape, write_adapter
from tunewright.tuners.dylora import truncate
from tunewright.tuners.files import read_tensors
from tunewright.tuners.peft_adapter import file_name

# name -> peft's combination_type
HOW = {"linear": "linear", "cat": "cat", "svd": "svd", "ties": "ties", "dare": "dare_linear", "dare_ties": "dare_ties"}
PRUNES = ("ties", "dare", "dare_ties")
FIRST_RANKS = "first_ranks"


def combine(
    model: nn.Module | None,
    sources: Sequence[Path],
    target: Path,
    *,
    how: str = "svd",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    base: str = "",
) -> None:
    """Write the combination of saved LoRA adapters to the folder `target`, as peft's two files.

    model: the base, loaded; it is changed. None will do for first_ranks. how: a key of HOW, or first_ranks (of one
    adapter). weights: a factor on each adapter's update, 1 / their number if None. rank: of the result, for svd and
    first_ranks. density: share of the entries that ties and dare keep. base: what the file calls the base.
    Raises SpecError for what cannot be combined, CheckpointError for files that cannot be read.
    """
    if how == FIRST_RANKS:
        _one(sources)
        truncate(sources[0], target, rank or saved_shape(sources[0])["r"])
        return
    check(sources, how, weights, rank, density)
    assert model is not None
    names = [f"source{i}" for i in range(len(sources))]
    with quiet(), torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        merged: Any = PeftModel.from_pretrained(model, str(sources[0]), names[0])
        for name, folder in zip(names[1:], sources[1:], strict=True):
            merged.load_adapter(str(folder), name)
        for name in names:
            merged.peft_config[name].use_rslora = False  # the layers have their scales; the result's is 1
        merged.base_model.add_weighted_adapter(
            names,
            list(weights or [1 / len(names)] * len(names)),
            "default",
            HOW[how],
            svd_rank=rank,
            svd_full_matrices=False,
            density=density if how in PRUNES else None,
        )
    tensors = {file_name(n): p for n, p in merged.named_parameters() if ".lora_" in n and ".default." in n}
    write_adapter(target, merged.peft_config["default"].to_dict(), base, tensors)


def check(sources: Sequence[Path], how: str, weights: Sequence[float] | None, rank: int | None, density: float) -> None:
    """Raise one SpecError that lists everything in the way of combining these adapters so."""
    if how not in HOW:
        raise SpecError(
            f"how is '{how}'; use one of: {', '.join([*HOW, FIRST_RANKS])}{did_you_mean(how, HOW)}.", param="how"
        )
    shapes = [saved_shape(folder) for folder in sources]
    ranks = [shape.get("r") for shape in shapes]
    other = sorted({shape["method"] for shape in shapes} - {"lora", "rslora"})
    heads = [folder.name for folder in sources if read_config(folder).get("modules_to_save")]
    problems = {
        f"there are {len(sources)} adapters; it takes at least two": len(sources) < 2,
        f"there is an adapter of the method {', '.join(other)}; only lora, rslora and dylora can be combined": other,
        "one has a head of its own, and heads cannot be combined": heads,
        "one adapts the experts of a mixture, which peft cannot combine": any("experts" in s for s in shapes),
        f"there are {len(weights or ())} weights for {len(sources)} adapters": weights and len(weights) != len(sources),
        f"their ranks are {ranks}, and {how} needs them equal; use cat or svd": how not in ("cat", "svd")
        and len(set(ranks)) > 1,
        f"rank is {rank}; it is for svd, and at least 1": rank is not None and (how != "svd" or rank < 1),
        f"density is {density}; use a share above 0 and at most 1, for example 0.5": not 0 < density <= 1,
    }
    found = [text for text, is_so in problems.items() if is_so]
    if found:
        raise SpecError(f"These adapters cannot be combined: {'; '.join(found)}.")
    for folder in sources:
        read_tensors(folder / WEIGHTS)  # peft would look for a pickle file if one were missing


def _one(sources: Sequence[Path]) -> None:
    if len(sources) != 1:
        raise SpecError(f"{FIRST_RANKS} takes one adapter, and there are {len(sources)}.")
