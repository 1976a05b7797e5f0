"""Before the model is loaded: the dtype and the quantization in which its weights fit."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from tunewright.core.errors import OutOfMemory
from tunewright.core.spec import JobSpec, parse_bytes
from tunewright.models import memory
from tunewright.models.shape import quantised_bytes
from tunewright.ops.quant import NONE, PACKAGE
from tunewright.train import meter
from tunewright.tuners.base import TunerCard

MARGIN = 0.95  # of the memory that is there
SMALLEST = "nf4"


def room_left(max_memory: str | None) -> float:
    """Bytes that this process may still take. max_memory: the job's own limit on all it holds."""
    return MARGIN * meter.limit(parse_bytes(max_memory) if max_memory else None) - meter.resident()


def room_to_load(
    folder: Path, card: TunerCard, dtype: torch.dtype, spec: JobSpec, more: int = 0
) -> tuple[torch.dtype, str]:
    """(dtype, quantization) to load the base in. Of what is `auto`, float32 becomes bfloat16 where it would leave no
    room, and then the base becomes nf4 where the tuner works over it.

    card: the tuner's. dtype: of the computation. more: bytes for each parameter beside the model.
    Raises OutOfMemory when even the weights do not fit.
    """
    n = memory.stored_parameters(folder)
    limit = room_left(spec.max_memory) - n * more
    full = card.artefact == "weights"
    # with gradients and at least one moment; or with the scores by which the data chooses; or alone
    size = 12 if full else 8 if card.needs_data else 4 if card.float32_base else dtype.itemsize
    if n * size > 0.8 * limit and not card.float32_base and spec.dtype == "auto" and dtype == torch.float32:
        dtype, size = torch.bfloat16, 2
    if spec.quantization not in ("auto", NONE):
        quantization, need = spec.quantization, quantised_bytes(folder, n, size, spec.quantization)
    else:
        quantization, need = NONE, float(n * size)
    smallest = quantised_bytes(folder, n, size, SMALLEST) if need > 0.8 * limit and card.works_on_nf4 else need
    if spec.quantization == "auto" and smallest < need and find_spec(PACKAGE) is not None:
        quantization, need = SMALLEST, smallest
    if need > limit:
        what = "weights" + (", gradients and optimizer" if full else " and their scores" if card.needs_data else "")
        what += " (and what the job keeps beside them: the policy at step 0, copies for `retain`)" if more else ""
        raise OutOfMemory(
            f"This job does not fit into memory: the {what} of {n:,} parameters alone need "
            f"{(need + n * more) / 1e9:.1f} GB, and {max(limit + n * more, 0) / 1e9:.1f} GB are there. "
            f"{' '.join(_ways_out(spec, card, n, smallest, need, limit))}"
        )
    return dtype, quantization


def _ways_out(spec: JobSpec, card: TunerCard, n: int, smallest: float, need: float, limit: float) -> Iterator[str]:
    """What would fit. smallest, need: bytes in nf4 and as the job asks."""
    if card.float32_base and n * 2.5 < limit:
        yield "Use the tuner 'lora'."
    elif smallest < need and smallest < limit:
        install = "" if find_spec(PACKAGE) else f"pip install {PACKAGE} and "
        yield f"For 4 bits ({smallest / 1e9:.1f} GB) {install}set quantization: {SMALLEST}."
    else:
        yield "Choose a smaller model."
    if spec.max_memory:
        yield f"The job itself allows max_memory {spec.max_memory}."


def held_text(quantization: str, asked: str) -> str:
    """What the job's events say of a quantised base. asked: the job's own `quantization`."""
    why = " because it would not fit otherwise" if asked == "auto" else ""
    return (
        f"The base's linear layers are held in {quantization}{why}; the adapter is trained over them and served over "
        "the unquantised base"
    )
