"""Kernels in C++ for training on a CPU, compiled once for this processor by the machine's own compiler.

The library is a plain shared object called through ctypes, so neither Python's nor torch's headers are needed. Its file
name is made of the sources, the compiler and the processor: a change of any of them compiles anew.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunewright.core.durable import fsync_path

SOURCES = Path(__file__).parent
FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math"),
    *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
)
COMPILERS = ("g++", "clang++", "c++")
_KINDS = {int: ctypes.c_int64, float: ctypes.c_double}  # everything else is an address
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class KernelsMissing(Exception):
    """The kernels cannot be had on this machine; the text says why and what would help."""


class Kernels:
    """The loaded library. threads: CPU threads that each call uses. tiles: whether the AMX products may be called."""

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self._library = library
        self._functions: dict[str, Any] = {}
        self.threads = threads
        self.tiles = bool(library.has_tiles())

    def __call__(self, name: str, *arguments: Tensor | float | int | None) -> None:
        """Call a function of kernels.cpp with these arguments and the number of threads. Tensors go as addresses:
        the caller answers for dtype, shape and strides. `name` may end in a dtype's name (`rope_float32`).

        Raises MemoryError.
        """
        function = self._functions.get(name) or self._declare(name, arguments)
        if function(*[x.data_ptr() if isinstance(x, Tensor) else x for x in arguments], self.threads):
            raise MemoryError(f"no memory for {name}")

    def _declare(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """Each function takes the same kinds at every call: said once, not converted one by one."""
        function = self._functions[name] = getattr(self._library, name)
        function.argtypes = [*(_KINDS.get(type(x), ctypes.c_void_p) for x in arguments), ctypes.c_int64]
        return function

    def rows(self, name: str, dtype: torch.dtype, *arguments: Tensor | float | int | None) -> None:
        """Call the variant of a row-wise function for `dtype` (float32 or bfloat16)."""
        self(f"{name}_{_DTYPES[dtype]}", *arguments)


def addresses(weights: Tensor) -> Tensor:
    """[n / 16] where each sixteen rows of a contiguous [n, k] lie in memory."""
    step = 16 * weights.shape[1] * weights.element_size()
    return weights.data_ptr() + step * torch.arange(weights.shape[0] // 16)


def double(x: float) -> int:
    """The bits of a float64, for a struct of C among whole numbers."""
    return int(torch.tensor(x, dtype=torch.float64).view(torch.int64))


def load_kernels(folder: Path, threads: int) -> Kernels:
    """The kernels, compiled into `folder` first if need be (some seconds, once). Raises KernelsMissing."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))), None)
    if compiler is None:
        raise KernelsMissing("There is no C++ compiler. Install one (Debian and Ubuntu: apt install g++).")
    try:
        library = folder / f"kernels-{_fingerprint(compiler)}.so"
        if library.is_file():
            with suppress(OSError):  # damaged, say by a power failure: it is compiled anew
                return Kernels(ctypes.CDLL(str(library)), threads)
        _compile(compiler, library)
        return Kernels(ctypes.CDLL(str(library)), threads)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise KernelsMissing(f"The kernels could not be compiled or loaded: {e}.") from e


def _compile(compiler: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    fresh = library.with_name(f"{library.name}.{os.getpid()}.tmp-new")
    command = [compiler, *FLAGS, "-w", str(SOURCES / "kernels.cpp"), "-o", str(fresh)]
    # in a session of its own: a signal that asks the job to stop must not look like a compiler that fails
    done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True, timeout=300)
    if done.returncode:
        fresh.unlink(missing_ok=True)
        raise KernelsMissing(f"{Path(compiler).name} could not compile the kernels: {done.stderr.strip()[:300]}")
    fsync_path(fresh)
    fresh.replace(library)  # two processes may do this at once: both files are whole and the same


def _fingerprint(compiler: str) -> str:
    """Of everything the compiled code depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = [version, *FLAGS, *_processor()]
    parts += [path.read_text() for path in sorted(SOURCES.iterdir()) if path.suffix in (".cpp", ".h")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> list[str]:
    """What -march=native may turn into: the processor's model and its instructions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    told = {
        line.partition("\t")[0]: line for line in lines if line.startswith(("model", "flags", "cpu family", "Features"))
    }
    return [platform.machine(), platform.processor(), *told.values()]
