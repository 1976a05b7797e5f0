"""How much memory this process holds, held and may hold: of the GPU if there is one, else of the machine.

On Linux the kernel's own high-water mark is read and reset (/proc/self, proc(5)); elsewhere only the peak since the
start is known. Limits are read from the control groups (v2 and v1), the machine and the job's own `max_memory`.
"""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path

import psutil
import torch

from tunewright.ops.runtime import trim

_STATUS, _CLEAR, _GROUPS = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/sys/fs/cgroup")
# control group files: limit, usage, and the key in memory.stat of the page cache that the kernel would give up first
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def resident() -> int:
    """Bytes held now."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def peak() -> int:
    """Bytes held at most since the start or the last reset()."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if _STATUS.exists():
        return next(int(s.split()[1]) << 10 for s in _STATUS.read_text().splitlines() if s.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset() -> int:
    """Begin a new peak where the system allows it; returns the one so far."""
    before = peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR.exists():
        try:
            _CLEAR.write_text("5")
        except OSError:  # not allowed in some containers: then peaks only grow, and a prediction is too high at worst
            return before
    return before


class Peak:
    """The highest mark since this was made, over any number of resets."""

    def __init__(self) -> None:
        self._before = 0

    def restart(self) -> None:
        self._before = max(self._before, reset())

    def so_far(self) -> int:
        return max(self._before, peak())


def release() -> None:
    """Give memory that is free inside the process back to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim()


def free() -> int:
    """Bytes that could still be had."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return min([psutil.virtual_memory().available, *_group_room()])


def limit(max_memory: int | None) -> int:
    """Bytes that this process may hold in all. max_memory: the job's own limit."""
    own = resident() + free()
    return own if max_memory is None else min(own, max_memory)


def _group_room() -> list[int]:
    """What each control group of this process still allows."""
    rooms = []
    for folder in _group_folders():
        for limit_file, usage_file, cache in _FILES:
            try:
                text = (folder / limit_file).read_text().strip()
                used = int((folder / usage_file).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if text != "max":
                rooms.append(max(0, int(text) - used + int(stat.get(cache, 0))))
    return rooms


def _group_folders() -> list[Path]:
    """The folders of this process's memory groups, with all above them."""
    own = Path("/proc/self/cgroup")
    found: dict[Path, None] = {}
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = _GROUPS / controllers if controllers else _GROUPS
            place = root / path.lstrip("/")
            for folder in (place, *place.parents):
                found[folder] = None
                if folder == root:
                    break
    return list(found)
