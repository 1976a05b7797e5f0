"""How this process computes: dtype, threads, seeds, determinism."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CPUINFO, _MAPS = Path("/proc/cpuinfo"), Path("/proc/self/maps")


def device() -> torch.device:
    """The device to train on: CUDA when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 faster than float32: CUDA's, or the CPU's AMX or AVX512 instructions."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    flags = _CPUINFO.read_text() if _CPUINFO.exists() else ""
    return "amx_bf16" in flags or "avx512_bf16" in flags


def choose_dtype(name: str = "auto") -> torch.dtype:
    """The dtype of products: `auto` is bfloat16 where it is fast, else float32. Raises ValueError for another name."""
    if name == "auto":
        return torch.bfloat16 if fast_bfloat16() else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype is '{name}'; use one of: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def set_threads(threads: str | int = "auto") -> int:
    """Set and return the number of CPU threads. `auto` is every core this process may use."""
    n = len(os.sched_getaffinity(0)) if threads == "auto" else int(threads)
    torch.set_num_threads(n)
    return n


def trim() -> None:
    """Give memory that is free inside the process back to the system, where it can be asked to."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def forget_read(tensors: Sequence[Tensor]) -> None:
    """Let go of the pages that were read of the safetensors files of which these tensors are views: they count as held
    as long as there is one view. They are read again when they are looked at. Nobody may have written to another view
    of the same opening of the file: that would be lost. Does nothing where the system has no /proc."""
    places = [t.data_ptr() for t in tensors]
    for line in _MAPS.read_text().splitlines() if _MAPS.exists() else []:
        if not line.endswith(".safetensors"):
            continue
        start, end = (int(x, 16) for x in line.split(maxsplit=1)[0].split("-"))
        if any(start <= place < end for place in places):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts and on nothing else (no process, no Python hash seed)."""
    text = "\0".join(str(p) for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Set every random state from (seed, step, rank), so that a resumed step draws what the first one drew."""
    drawn = derive_seed("step", seed, step, rank)
    random.seed(drawn)
    torch.manual_seed(drawn)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers within the block; errors still raise."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def be_deterministic() -> None:
    """Ask torch for kernels that give the same bits on every run with the same threads and machine."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # else every torch.empty costs a fill
    torch.backends.cudnn.benchmark = False
