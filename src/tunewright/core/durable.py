"""Files that survive a crash: atomic writes, committed folders, locks, hashes.

A folder commits in one order: files, fsync of each, MANIFEST.json with every size and sha256, fsync, rename, fsync of
the parent. A reader trusts a folder only if its manifest checks out.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunewright.core.errors import Busy, CheckpointError, DiskFull
from tunewright.core.ids import random_part

MANIFEST = "MANIFEST.json"
_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def disk_full_is_clear(what: str) -> Iterator[None]:
    """Turn 'no space left' into one DiskFull that names `what` was being written."""
    try:
        yield
    except Exception as e:
        full = isinstance(e, OSError) and e.errno in _FULL
        # safetensors reports the operating system's error as text only
        if full or "No space left on device" in str(e) or "os error 28" in str(e):
            raise DiskFull(
                f"The disk is full: {what} could not be written. Nothing already saved was lost. "
                "Free some space, then resume the job."
            ) from e
        raise


def fsync_path(path: Path) -> None:
    """fsync a file or a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in 1 MiB blocks."""
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` so that a reader sees either the old file or the new one, also after a power cut."""
    tmp = path.with_name(f".{path.name}.{random_part(8)}.tmp")
    with disk_full_is_clear(path.name):
        try:
            with open(tmp, "xb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(tmp, path)
            fsync_path(path.parent)
        finally:
            tmp.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """write_atomic of indented JSON; NaN and infinity are refused."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def commit_folder(final: Path, fill: Callable[[Path], None], info: dict[str, Any] | None = None) -> Path:
    """Fill a temporary folder beside `final`, seal it with a manifest and rename it into place.

    fill: writes the files (sub-folders allowed) into the folder it is given.
    info: extra keys of the manifest. A `final` that exists already is replaced (moved away first, then deleted).
    """
    tmp = final.with_name(f"{final.name}.tmp-{random_part(8)}")
    with disk_full_is_clear(f"'{final.name}'"):
        try:
            tmp.mkdir(parents=True)
            fill(tmp)
            files = []
            for p in sorted(q for q in tmp.rglob("*") if q.is_file()):
                fsync_path(p)
                files.append({"name": str(p.relative_to(tmp)), "size": p.stat().st_size, "sha256": sha256_file(p)})
            write_json(tmp / MANIFEST, {"format_version": 1, **(info or {}), "files": files})
            for d in [q for q in tmp.rglob("*") if q.is_dir()] + [tmp]:
                fsync_path(d)
            if final.exists():
                discard(final)
            os.rename(tmp, final)
            fsync_path(final.parent)
        except BaseException:
            shutil.rmtree(tmp, ignore_errors=True)
            raise
    return final


def check_folder(folder: Path) -> dict[str, Any]:
    """The manifest of a committed folder, after checking the size and sha256 of every file.

    Raises CheckpointError naming the first file that is missing, cut off or changed.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"'{folder.name}' has no readable {MANIFEST}; it was not saved completely.") from e
    for f in files:
        p = folder / f["name"]
        if not p.is_file():
            raise CheckpointError(f"'{folder.name}' misses the file {f['name']}.")
        if p.stat().st_size != f["size"] or sha256_file(p) != f["sha256"]:
            raise CheckpointError(f"'{folder.name}': the file {f['name']} was changed or cut off after saving.")
    return manifest


def discard(path: Path) -> None:
    """Delete a folder so that a crash half-way leaves only a `.trash-` folder that sweep() removes."""
    trash = path.with_name(f".trash-{path.name}-{random_part(8)}")
    os.rename(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove what crashes left behind: `*.tmp-*`, `.*.tmp`, `.trash-*`. Call only while holding the owner's lock."""
    if not parent.is_dir():
        return
    for p in parent.iterdir():
        if ".tmp-" in p.name or p.name.startswith(".trash-") or (p.name.startswith(".") and p.name.endswith(".tmp")):
            shutil.rmtree(p, ignore_errors=True) if p.is_dir() else p.unlink(missing_ok=True)


class Lock:
    """An exclusive advisory lock on a file, freed by the kernel when the process dies. Holds who has it as text."""

    def __init__(self, path: Path, owner: str = "") -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            holder = os.read(self._fd, 200).decode(errors="replace").strip()
            os.close(self._fd)
            raise Busy(f"'{path.parent.name}' is in use by another process{f' ({holder})' if holder else ''}.") from e
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, (owner or f"pid {os.getpid()}").encode(), 0)

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock at `path`."""
    if not path.exists():
        return False
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
